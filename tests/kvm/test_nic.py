"""Two guests of a few instructions and a host in Python on a switch: real kicks, no TAP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import avmm
from avmm.virtio.transport.pci_common import QUEUE_SELECT
from fakes.frames import BROADCAST, A, frame
from fakes.mmio_driver import eventually
from fakes.tiny_driver import COMMON, DRIVER, NOTIFY, USED

Assemble = Callable[[str], Path]

DATA = 0x310000
RX, TX = 0, 1
FRAME = frame(to=BROADCAST, sender=A, payload=b"a frame of sixty bytes, by hand".ljust(46, b"."))


def driver(queue: int) -> str:
    """DRIVER with this queue instead of the first."""
    select = f"poke w, {COMMON + QUEUE_SELECT:#x}, {queue}\n"
    first, rest = DRIVER.split("    xor %ecx, %ecx\n")
    first = first.replace(f"poke w, {NOTIFY:#x}, 0", f"poke w, {NOTIFY + 4 * queue:#x}, {queue}")
    at = rest.index(f"    poke w, {COMMON + 0x18:#x}")
    return f"{first}    xor %ecx, %ecx\n{rest[:at]}    {select}{rest[at:]}"


SENDER = (
    driver(TX)
    + f"""
    descriptor 0, packet, {12 + len(FRAME)}, 0, 0
9:  offer 0
    await_all
    jmp 9b
packet: .fill 12, 1, 0
    .byte {",".join(map(str, FRAME))}
"""
)

RECEIVER = (
    driver(RX)
    + f"""
    descriptor 0, {DATA:#x}, 2048, 2, 0
    offer 0
    await_all
    movl {USED + 8:#x}, %ecx
    mov ${DATA:#x}, %esi
    mov $0x3f8, %dx
    cld
    rep outsb
    poweroff
"""
)


def config(kernel: Path, nic: avmm.Nic) -> avmm.Config:
    return avmm.Config(kernel=str(kernel), memory="4M", cmdline="", nets=[nic])


async def test_a_frame_goes_from_guest_to_guest_and_to_python(tiny_guest: Assemble) -> None:
    nics = [avmm.Nic(), avmm.Nic()]
    with avmm.Switch() as switch:
        for nic in nics:
            switch.attach(nic)
        host = switch.port()
        async with (
            avmm.MicroVM(config(tiny_guest(RECEIVER), nics[1])) as receiver,
            avmm.MicroVM(config(tiny_guest(SENDER), nics[0])),
        ):
            assert (await receiver.wait()).kind is avmm.ExitKind.POWEROFF
            packet = receiver.console.scrollback
            assert await host.receive() == FRAME
        assert packet[12:] == FRAME
        assert packet[10:12] == b"\1\0"
    assert not nics[0].is_up


async def test_an_iteration_ends_with_the_guest(tiny_guest: Assemble) -> None:
    nic = avmm.Nic()
    count = 0
    async with avmm.MicroVM(config(tiny_guest(SENDER), nic)) as vm:
        async for each in nic:
            assert each == FRAME
            count += 1
            if count == 3:
                await vm.kill()
        assert count >= 3
    assert await nic.receive() == b""


async def test_a_guest_sends_no_more_than_its_limit_and_more_when_that_is_lifted(
    tiny_guest: Assemble,
) -> None:
    nic = avmm.Nic(tx_limit=avmm.RateLimit(ops=1, ops_burst=2))
    async with avmm.MicroVM(config(tiny_guest(SENDER), nic)) as vm:
        for _ in range(2):
            assert await anext(nic) == FRAME
        await eventually(lambda: vm.statistics().devices["net0"].counters["tx_throttled"] > 0)
        vm.set_nic_limits("net0", rx=None, tx=None)
        for _ in range(20):
            assert await anext(nic) == FRAME
        with pytest.raises(avmm.ConfigError, match="no NIC 'blk0'"):
            vm.set_nic_limits("blk0", rx=None, tx=None)
        with pytest.raises(avmm.ConfigError, match="no disk 'net0'"):
            vm.set_disk_limit("net0", None)


async def test_a_cable_that_is_pulled_is_an_event(tiny_guest: Assemble) -> None:
    nic = avmm.Nic()
    vm = avmm.MicroVM(config(tiny_guest(SENDER), nic))
    events = vm.events()
    async with vm:
        nic.set_link(False)
        vm.set_link("net0", True)
    changes = [event.up async for event in events if isinstance(event, avmm.LinkChanged)]
    assert changes == [False, True]
