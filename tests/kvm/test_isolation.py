"""A microVM in a worker process does what one in this process does, and its worker's end is its
own."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import avmm
from avmm.machine.isolation import launch, messages, remote
from fakes.probing_worker import worker_pid
from fakes.tiny_driver import COPIER

Assemble = Callable[[str], Path]

pytestmark = pytest.mark.asyncio(loop_factories=["uvloop"])

SPIN = "putc 'x'\n1: jmp 1b"
BUTTON = "putc 'x'\n1: inb 0x603\ntest $1, %al\njz 1b\npoweroff"


def isolated(kernel: Path, **more: object) -> avmm.MicroVM:
    values = {"kernel": str(kernel), "memory": "4M", "cmdline": "", **more}
    return avmm.MicroVM(avmm.Config(**values), isolation="process")  # type: ignore[arg-type]


def held() -> tuple[list[str], list[int]]:
    """Our descriptors and our children."""
    fds = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            fds.append(os.readlink(f"/proc/self/fd/{fd}").split(":")[0])
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
    # What the test's own tools opened once is not ours to count.
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    fds = [fd for fd in fds if not fd.startswith(("/proc", "/dev/null"))]
    return sorted(fds), sorted(map(int, children))


@pytest.mark.asyncio(loop_factories=["uvloop", "asyncio"])
async def test_a_life_leaves_its_output_and_statistics_and_nothing_else(
    tiny_guest: Assemble,
) -> None:
    before = held()
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
    async with isolated(guest, rng=True, cpus=2) as vm:
        events = vm.events()
        assert (await vm.wait()).kind is avmm.ExitKind.POWEROFF
    expected = bytes((count & 0x3F) + 0x30 for count in range(40000, 0, -1))
    assert vm.console.scrollback == expected
    assert [type(event) for event in [event async for event in events]][-2:] == [
        avmm.ConsoleClosed,
        avmm.Ended,
    ]
    statistics = vm.statistics()
    assert sum(vcpu.uart for vcpu in statistics.vcpus) == 40000
    assert statistics.console.tx_bytes == 40000
    assert statistics.devices["rng0"].type == "rng"
    assert hash(statistics)
    assert statistics.start_s > 0
    assert held() == before


@pytest.mark.parametrize(
    "more", [{"engine": "io_uring"}, {"engine": "threads", "home": "thread"}, {"pinned": True}]
)
async def test_a_disk_is_read_and_written(
    tiny_guest: Assemble, tmp_path: Path, more: dict[str, object]
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1024) + b"read by a guest".ljust(3072, b"\0"))
    disk = avmm.Disk(str(image), limit=avmm.RateLimit(ops=1000), **more)  # type: ignore[arg-type]
    vm = isolated(tiny_guest(COPIER), disks=[disk], io_threads=int("home" in more))
    events = vm.events()
    async with vm:
        assert (await vm.wait()).kind is avmm.ExitKind.POWEROFF
    assert vm.console.scrollback == b"read by a guest"
    assert image.read_bytes()[7 * 512 :].startswith(b"read by a guest")
    ready = [event.device async for event in events if isinstance(event, avmm.DriverReady)]
    assert ready == ["blk0"]
    counters = vm.statistics().devices["blk0"].counters
    assert (counters["reads"], counters["writes"]) == (1, 1)


async def test_a_broken_ring_is_an_event_with_its_kind(
    tiny_guest: Assemble, tmp_path: Path
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    guest = tiny_guest(COPIER.replace("offer 0\n", "offer 99\n", 1))
    vm = isolated(guest, disks=[avmm.Disk(str(image))])
    events = vm.events()
    async with vm:
        async for event in events:
            if isinstance(event, avmm.DeviceFault):
                break
        assert (event.device, event.kind) == ("blk0", "bad-head")
        assert vm.state is avmm.State.RUNNING


@pytest.mark.asyncio(loop_factories=["uvloop", "asyncio"])
async def test_input_is_read_back_whole_and_in_order(tiny_guest: Assemble) -> None:
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
    text = bytes(range(0x61, 0x7B)) * 700  # more than goes in one piece
    async with isolated(guest) as vm:
        reader, writer = vm.console.open(hold=True)
        writer.write(text)
        await writer.drain()
        await vm.console.write(b"again")
        await vm.console.write(b"again")
        writer.write(b"!")
        assert await reader.read() == text + b"againagain!"
        await vm.wait()


async def test_a_reader_that_holds_makes_the_guest_wait_and_loses_nothing(
    tiny_guest: Assemble,
) -> None:
    count = 260_000  # more than the ring, the reader and the pipe between take
    guest = tiny_guest(f"""
        mov $0x3f8, %dx
        mov $buffer, %esi
        mov ${count}, %ecx
        cld
        rep outsb
        poweroff
    buffer: .fill {count}, 1, 0x61
    """)
    async with isolated(guest) as vm:
        reader, _ = vm.console.open(hold=True, limit=1000)
        await reader.readexactly(1)
        await vm.pause()
        assert vm.statistics().console.tx_bytes < count
        await vm.resume()
        assert await reader.read() == (count - 1) * b"a"
        await vm.wait()
        assert vm.console.end == count


async def test_a_killed_guest_that_was_held_leaves_what_it_wrote(tiny_guest: Assemble) -> None:
    guest = tiny_guest("mov $0x3f8, %dx\nmov $'x', %al\n1: out %al, %dx\njmp 1b")
    async with isolated(guest) as vm:
        reader, _ = vm.console.open(hold=True, limit=1000)
        await reader.read(1)
        await vm.pause()
        written = vm.statistics().console.tx_bytes
        assert (await vm.kill()).kind is avmm.ExitKind.KILLED
        assert vm.console.end == written


async def test_pause_resume_and_stop(tiny_guest: Assemble) -> None:
    async with isolated(tiny_guest(BUTTON), cpus=2) as vm:
        await vm.console.expect(b"x")
        events = vm.events()
        await vm.pause()
        assert vm.state is avmm.State.PAUSED
        await vm.pause()
        counted = vm.statistics().vcpus
        while vm.statistics().vcpus == counted:  # a resumed guest gets on, sooner or later
            await vm.resume()
            assert vm.state is avmm.State.RUNNING
            await vm.pause()
        assert (await vm.stop()).kind is avmm.ExitKind.STOPPED
        with pytest.raises(avmm.ConfigError, match="this microVM is stopped"):
            await vm.pause()
    names = [type(event).__name__ async for event in events]
    assert names[:2] == ["Paused", "Resumed"]
    assert names[-4:] == ["Resumed", "StopRequested", "ConsoleClosed", "Ended"]


async def test_limits_of_disks_change_while_the_guest_runs(
    tiny_guest: Assemble, tmp_path: Path
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    async with isolated(tiny_guest(SPIN), disks=[avmm.Disk(str(image))], rng=True) as vm:
        vm.set_disk_limit("blk0", avmm.RateLimit(bps="1M"))
        vm.set_disk_limit("blk0", None)
        for id in ("blk1", "rng0"):
            with pytest.raises(avmm.ConfigError, match=f"no disk '{id}'"):
                vm.set_disk_limit(id, None)
        with pytest.raises(avmm.ConfigError, match="no NIC"):
            vm.set_link("net0", False)
        with pytest.raises(avmm.ConfigError, match="no port"):
            vm.port("a")
        await vm.pause()  # the worker has seen all of it, and lives
        assert vm.state is avmm.State.PAUSED
        with pytest.raises(avmm.ConfigError, match="in use by another microVM"):
            await avmm.MicroVM(vm.config).start()


async def test_what_cannot_start_says_why_and_leaves_nothing(
    tiny_guest: Assemble, tmp_path: Path
) -> None:
    before = held()
    kernel, image = tiny_guest("poweroff"), tmp_path / "disk.img"
    image.write_bytes(bytes(1000))
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    cases = (
        (tmp_path / "none", {}, "Kernel .*none: No such file"),
        (script, {}, "is a script"),
        (kernel, {"initrd": str(tmp_path / "none")}, "Initrd .*none: No such file"),
        (kernel, {"disks": [avmm.Disk(str(tmp_path / "none"))]}, "Disk .*none: No such file"),
        (kernel, {"disks": [avmm.Disk(str(image))]}, "1000 bytes is not a multiple of 512"),
        (kernel, {"vsock": avmm.Vsock(uds=str(script / "v"))}, "Socket .*v: Not a directory"),
    )
    for path, more, message in cases:
        with pytest.raises(avmm.ConfigError, match=message):
            await isolated(path, **more).start()
        assert held() == before


@pytest.mark.parametrize(
    "point",
    [
        (launch, "_spawn"),
        (launch, "_read_line"),
        (remote, "_send"),
        (messages.Line, "next"),
        (remote.RemoteMachine, "go"),
    ],
    ids=lambda point: point[1],
)
async def test_cancellation_at_any_point_of_start_leaves_nothing(
    tiny_guest: Assemble,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    point: tuple[object, str],
) -> None:
    before = held()
    where, name = point
    original = getattr(where, name)

    def cancelling(*arguments: object) -> object:
        task.cancel()
        return original(*arguments)

    monkeypatch.setattr(where, name, cancelling)
    vm = isolated(tiny_guest(SPIN), vsock=avmm.Vsock(uds=str(tmp_path / "v")))
    task = asyncio.create_task(vm.start())
    await asyncio.wait([task])
    assert task.cancelled()
    assert vm.state is avmm.State.STOPPED
    assert not (tmp_path / "v").exists()
    assert held() == before


@pytest.mark.asyncio(loop_factories=["uvloop", "asyncio"])
async def test_a_worker_that_dies_is_one_microvms_error(tiny_guest: Assemble) -> None:
    before = held()
    guest = tiny_guest(BUTTON)
    async with isolated(guest) as first, isolated(guest) as second:
        pausing = asyncio.create_task(first.pause())
        os.kill(worker_pid(first), signal.SIGKILL)
        reason = await first.wait()
        assert reason.kind is avmm.ExitKind.ERROR
        assert isinstance(reason.error, avmm.HostError)
        assert reason.error.kind == "worker-died"
        assert "was killed by SIGKILL" in reason.detail
        await asyncio.wait([pausing])
        assert isinstance(pausing.exception(), avmm.AvmmError)
        with pytest.raises(avmm.HostError, match="has ended"):
            await first.console.write(b"x")
        assert first.statistics().state == "running"
        assert (await second.stop()).kind is avmm.ExitKind.STOPPED
    assert held() == before


@pytest.mark.asyncio(loop_factories=["uvloop", "asyncio"])
async def test_a_worker_that_the_kernel_keeps_holds_nobody_up(
    tiny_guest: Assemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it keeps one with requests that a disk's storage does not answer."""
    before = held()
    monkeypatch.setattr(remote, "GRACE_S", 0.02)
    monkeypatch.setattr(launch, "GONE_S", 0.02)
    monkeypatch.setattr(launch.WorkerGroup, "make", lambda *_: launch.WorkerGroup(group))
    group = tmp_path / "group"
    group.mkdir()
    vm = isolated(tiny_guest(SPIN))
    await vm.start()
    pid = worker_pid(vm)
    process = vm._machine.process  # type: ignore[union-attr]
    os.kill(pid, signal.SIGSTOP)
    with monkeypatch.context() as undying:
        undying.setattr(launch.WorkerProcess, "kill", lambda _: None)
        pausing = asyncio.create_task(vm.pause())
        await asyncio.sleep(0)
        with pytest.raises(avmm.HostError, match=f"Worker {pid} .* did not end") as caught:
            await vm.kill()
    assert caught.value.kind == "disk-hangs"
    assert vm.state is avmm.State.STOPPED
    await asyncio.wait([pausing])
    assert isinstance(pausing.exception(), avmm.AvmmError)
    assert vm.statistics().state == "running"
    assert group.exists()
    os.kill(pid, signal.SIGKILL)
    await process.ended
    assert not group.exists()
    assert held() == before


async def test_a_worker_that_does_not_resume_its_guest_is_ended(
    tiny_guest: Assemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "RESUME_LIMIT_S", 0.2)
    before = held()
    async with isolated(tiny_guest(SPIN)) as vm:
        await vm.pause()
        os.kill(worker_pid(vm), signal.SIGSTOP)
        with pytest.raises(avmm.HostError, match=r"An answer to resume\(\) in 0.2 s"):
            await vm.stop()
        reason = await vm.wait()
        assert reason.kind is avmm.ExitKind.ERROR
        assert "An answer to resume()" in reason.detail
    assert held() == before


async def test_a_program_that_ends_in_the_middle_gives_all_back(tiny_guest: Assemble) -> None:
    """asyncio.run() cancels every task there is, those that read what a worker says included."""
    guest = tiny_guest(SPIN)

    async def leave(vms: list[avmm.MicroVM]) -> None:
        await vms[0].start()
        starting = asyncio.create_task(vms[1].start())
        await asyncio.sleep(0)
        assert not starting.done()

    before = held()
    vms = [isolated(guest), isolated(guest)]
    await asyncio.to_thread(asyncio.run, leave(vms))
    assert [vm.state for vm in vms] == [avmm.State.STOPPED] * 2
    assert (await vms[0].wait()).kind is avmm.ExitKind.KILLED
    assert held() == before
