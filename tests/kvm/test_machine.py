"""A whole machine around a guest of a few instructions."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import avmm

Assemble = Callable[[str], Path]


def config(kernel: Path, **more: object) -> avmm.Config:
    return avmm.Config(kernel=str(kernel), memory="4M", cmdline="", **more)  # type: ignore[arg-type]


async def run(kernel: Path, **more: object) -> avmm.ExitReason:
    async with avmm.MicroVM(config(kernel, **more)) as vm:
        return await vm.wait()


async def test_acpi_sleep_type_5_powers_off(tiny_guest: Assemble) -> None:
    reason = await run(tiny_guest("poweroff"))
    assert reason.kind is avmm.ExitKind.POWEROFF


async def test_the_acpi_reset_register_reboots(tiny_guest: Assemble) -> None:
    assert (await run(tiny_guest("reboot"))).kind is avmm.ExitKind.REBOOT


async def test_the_keyboard_controllers_reset_reboots(tiny_guest: Assemble) -> None:
    assert (await run(tiny_guest("outb 0x64, 0xfe\n1: jmp 1b"))).kind is avmm.ExitKind.REBOOT


async def test_a_triple_fault_is_a_crash(tiny_guest: Assemble) -> None:
    guest = tiny_guest("lidt null(%rip)\nxor %ecx, %ecx\ndiv %ecx\nnull: .word 0\n.quad 0")
    reason = await run(guest)
    assert reason == avmm.ExitReason(avmm.ExitKind.CRASH, "triple fault")


async def test_pvpanic_is_a_crash(tiny_guest: Assemble) -> None:
    reason = await run(tiny_guest("outb 0x505, 1\n1: jmp 1b"))
    assert reason.kind is avmm.ExitKind.CRASH
    assert "pvpanic" in reason.detail


async def test_console_output_arrives_whole_and_in_order(tiny_guest: Assemble) -> None:
    guest = tiny_guest("""
        mov $0x3f8, %dx
        mov $40000, %ecx
    1:  mov %ecx, %eax
        and $0x3f, %al
        add $0x30, %al
        out %al, %dx
        dec %ecx
        jnz 1b
        poweroff
    """)
    async with avmm.MicroVM(config(guest)) as vm:
        await vm.wait()
        expected = bytes((count & 0x3F) + 0x30 for count in range(40000, 0, -1))
        assert vm.console.scrollback == expected


async def test_a_full_transmit_ring_makes_the_guest_wait_and_loses_nothing(
    tiny_guest: Assemble,
) -> None:
    count = 200_000  # more than three times the ring
    guest = tiny_guest(f"""
        mov $0x3f8, %dx
        mov $buffer, %esi
        mov ${count}, %ecx
        cld
        rep outsb
        poweroff
    buffer: .fill {count}, 1, 0x61
    """)
    vm = avmm.MicroVM(config(guest))
    await vm.start()
    reader, _ = vm.console.open(hold=True)
    assert await reader.read() == count * b"a"
    await vm.wait()
    assert vm.console.end == count


async def test_input_is_read_back_by_a_polling_guest(tiny_guest: Assemble) -> None:
    guest = tiny_guest("""
    1:  inb 0x3fd
        test $1, %al
        jz 1b
        inb 0x3f8
        mov $0x3f8, %dx
        out %al, %dx
        cmp $'!', %al
        jne 1b
        poweroff
    """)
    async with avmm.MicroVM(config(guest)) as vm:
        text = bytes(range(0x61, 0x7B)) * 40
        await vm.console.write(text + b"!")
        await vm.wait()
        assert vm.console.scrollback == text + b"!"


async def test_unassigned_ports_and_addresses_read_as_ones(tiny_guest: Assemble) -> None:
    guest = tiny_guest("""
        mov $0x1234, %dx
        in %dx, %eax
        cmp $0xffffffff, %eax
        jne 2f
        mov $0xd8000000, %ebx
        mov (%rbx), %eax
        cmp $0xffffffff, %eax
        jne 2f
        putc 'y'
        poweroff
    2:  putc 'n'
        poweroff
    """)
    async with avmm.MicroVM(config(guest)) as vm:
        await vm.wait()
        assert vm.console.scrollback == b"y"
        assert sum(v.unassigned for v in vm.statistics().vcpus) == 2


async def test_the_clock_tells_the_hosts_century(tiny_guest: Assemble) -> None:
    guest = tiny_guest("""
        outb 0x70, 0x32
        inb 0x71
        mov $0x3f8, %dx
        out %al, %dx
        poweroff
    """)
    async with avmm.MicroVM(config(guest)) as vm:
        await vm.wait()
        assert vm.console.scrollback == b"\x20"


async def test_kill_ends_a_guest_that_spins(tiny_guest: Assemble) -> None:
    async with avmm.MicroVM(config(tiny_guest("1: jmp 1b"), cpus=2)) as vm:
        reason = await vm.kill()
    assert reason.kind is avmm.ExitKind.KILLED


async def test_kill_ends_a_guest_that_halts_with_interrupts_off(tiny_guest: Assemble) -> None:
    async with avmm.MicroVM(config(tiny_guest("cli\n1: hlt\njmp 1b"))) as vm:
        reason = await vm.kill()
    assert reason.kind is avmm.ExitKind.KILLED


async def test_stop_without_a_power_button_handler_kills_after_the_grace(
    tiny_guest: Assemble,
) -> None:
    async with avmm.MicroVM(config(tiny_guest("1: jmp 1b"))) as vm:
        reason = await vm.stop(grace_s=0.01)
    assert reason.kind is avmm.ExitKind.KILLED


async def test_stop_is_reported_as_such_when_the_guest_obeys(tiny_guest: Assemble) -> None:
    guest = tiny_guest("""
    1:  inb 0x603
        test $1, %al
        jz 1b
        poweroff
    """)
    async with avmm.MicroVM(config(guest)) as vm:
        reason = await vm.stop()
    assert reason.kind is avmm.ExitKind.STOPPED


async def test_a_paused_guest_writes_nothing_until_it_is_resumed(tiny_guest: Assemble) -> None:
    guest = tiny_guest("mov $0x3f8, %dx\nmov $'x', %al\n1: out %al, %dx\njmp 1b")
    async with avmm.MicroVM(config(guest, cpus=2)) as vm:
        await vm.console.expect(b"x")
        await vm.pause()
        for _ in range(10):  # what it wrote before
            await asyncio.sleep(0)
        before = vm.console.end
        for _ in range(100):
            await asyncio.sleep(0)
        assert vm.console.end == before
        reader, _ = vm.console.open(scrollback=False)
        await vm.resume()
        assert await reader.read(1) == b"x"


async def test_a_cable_is_plugged_only_where_there_is_a_nic(tiny_guest: Assemble) -> None:
    async with avmm.MicroVM(config(tiny_guest("1: jmp 1b"), rng=True)) as vm:
        for id in ("net0", "rng0"):
            with pytest.raises(avmm.ConfigError, match=f"no NIC '{id}'"):
                vm.set_link(id, False)


async def test_leaving_the_block_ends_the_guest(tiny_guest: Assemble) -> None:
    async with avmm.MicroVM(config(tiny_guest("1: jmp 1b"))) as vm:
        assert vm.state is avmm.State.RUNNING
    assert vm.state is avmm.State.STOPPED
    assert (await vm.wait()).kind is avmm.ExitKind.KILLED


async def test_expect_tells_when_the_guest_ended_first(tiny_guest: Assemble) -> None:
    async with avmm.MicroVM(config(tiny_guest("putc 'a'\npoweroff"))) as vm:
        with pytest.raises(avmm.HostError, match="ended"):
            await vm.console.expect(b"never")


def held() -> tuple[list[str], list[str]]:
    fds = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            fds.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
    threads = [t.name for t in threading.enumerate() if t.name.startswith("avmm")]
    return sorted(f for f in fds if not f.startswith("/proc")), threads


async def warm_up(kernel: Path) -> None:
    """What asyncio itself opens once (its thread pool) is not ours to count."""
    await run(kernel)


@pytest.mark.parametrize("ending", ["poweroff", "kill", "cancel", "exception"])
async def test_nothing_is_left_after_any_ending(
    tiny_guest: Assemble, tmp_path: Path, ending: str
) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(4096))
    await warm_up(tiny_guest("poweroff"))
    before = held()
    kernel = tiny_guest("poweroff" if ending == "poweroff" else "1: jmp 1b")

    started = asyncio.Event()

    async def live() -> None:
        async with avmm.MicroVM(config(kernel, disks=[avmm.Disk(str(disk))], rng=True)) as vm:
            started.set()
            if ending == "kill":
                await vm.kill()
            elif ending == "exception":
                raise ValueError("the body fails")
            await vm.wait()

    task = asyncio.create_task(live())
    if ending == "cancel":
        await started.wait()
        task.cancel()
    await asyncio.wait([task])
    assert held() == before


async def test_nothing_is_left_when_start_fails_half_way(
    tiny_guest: Assemble, tmp_path: Path
) -> None:
    good, bad = tmp_path / "good.img", tmp_path / "bad.img"
    good.write_bytes(bytes(4096))
    bad.write_bytes(bytes(1000))
    kernel = tiny_guest("poweroff")
    await warm_up(kernel)
    before = held()
    disks = [avmm.Disk(str(good)), avmm.Disk(str(bad))]
    with pytest.raises(avmm.ConfigError, match="1000 bytes is not a multiple of 512"):
        await run(kernel, disks=disks)
    assert held() == before


async def test_cancellation_at_any_point_of_start_leaves_nothing(
    tiny_guest: Assemble, tmp_path: Path
) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(4096))
    kernel = tiny_guest("1: jmp 1b")
    await warm_up(tiny_guest("poweroff"))
    before = held()
    for turns in range(12):
        task = asyncio.create_task(run(kernel, disks=[avmm.Disk(str(disk))]))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert held() == before


async def test_two_microvms_of_one_process_do_not_disturb_each_other(
    tiny_guest: Assemble,
) -> None:
    talker = tiny_guest("mov $1000, %ecx\n1: putc 'a'\ndec %ecx\njnz 1b\npoweroff")
    spinner = tiny_guest("1: jmp 1b")
    async with (
        avmm.MicroVM(config(spinner)) as first,
        avmm.MicroVM(config(talker)) as second,
    ):
        assert (await second.wait()).kind is avmm.ExitKind.POWEROFF
        assert second.console.scrollback == b"a" * 1000
        assert first.state is avmm.State.RUNNING


async def test_a_second_microvm_cannot_write_the_same_disk(
    tiny_guest: Assemble, tmp_path: Path
) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(4096))
    kernel = tiny_guest("1: jmp 1b")
    async with avmm.MicroVM(config(kernel, disks=[avmm.Disk(str(disk))])):
        with pytest.raises(avmm.ConfigError, match="in use by another microVM"):
            await run(kernel, disks=[avmm.Disk(str(disk))])


async def test_a_guest_ends_with_an_error_when_the_loop_is_gone(tiny_guest: Assemble) -> None:
    vm = avmm.MicroVM(config(tiny_guest("1: jmp 1b")))

    def other_loop() -> None:
        asyncio.run(vm.start())  # and nobody closes it

    await asyncio.to_thread(other_loop)
    assert vm.state is avmm.State.STOPPED
    assert not [t for t in threading.enumerate() if t.name.startswith("avmm-vcpu")]


async def test_no_kick_is_lost_over_many_pauses(tiny_guest: Assemble) -> None:
    """Each pause needs every vCPU's KVM_RUN to end, whatever point of its loop it is at."""
    guest = tiny_guest("""
    1:  mov $0x1234, %dx
        in %dx, %al
        mov $0x601, %dx
        in %dx, %al
        putc 'x'
        jmp 1b
    """)
    async with avmm.MicroVM(config(guest, cpus=2)) as vm:
        for _ in range(300):
            await vm.pause()
            assert vm.state is avmm.State.PAUSED
            await vm.resume()
        reader, _ = vm.console.open(scrollback=False)
        await reader.read(1)  # it still runs
        assert (await vm.kill()).kind is avmm.ExitKind.KILLED


async def test_stop_reaches_a_paused_guest(tiny_guest: Assemble) -> None:
    guest = tiny_guest("1: inb 0x603\ntest $1, %al\njz 1b\npoweroff")
    async with avmm.MicroVM(config(guest)) as vm:
        await vm.pause()
        assert (await vm.stop()).kind is avmm.ExitKind.STOPPED


async def test_calls_that_need_a_running_guest_say_so(tiny_guest: Assemble) -> None:
    vm = avmm.MicroVM(config(tiny_guest("poweroff")))
    for call in (vm.stop, vm.kill, vm.pause, vm.wait):
        with pytest.raises(avmm.ConfigError, match="this microVM is new"):
            await call()
    async with vm:
        await vm.wait()
        with pytest.raises(avmm.ConfigError, match="this microVM is stopped"):
            await vm.pause()
        with pytest.raises(avmm.ConfigError, match="not new"):
            await vm.start()
        assert (await vm.stop()).kind is avmm.ExitKind.POWEROFF


def free_huge_pages() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("HugePages_Free:"):
            return int(line.split()[1])
    return 0


async def test_reserved_huge_pages_back_the_memory_or_are_asked_for(tiny_guest: Assemble) -> None:
    kernel = tiny_guest("poweroff")
    if free_huge_pages() < 2:
        with pytest.raises(avmm.HostError, match=r"2 huge pages of 2M are needed"):
            await run(kernel, hugepages=True)
    else:
        assert (await run(kernel, hugepages=True)).kind is avmm.ExitKind.POWEROFF
