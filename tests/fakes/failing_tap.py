"""A program with a NIC on a TAP that fails, goes down and is removed.

python -m fakes.failing_tap IO_THREADS, on a failing_host: in a network namespace of its own. Exit
status 77: there can be none here. The first failure that becomes something else than it should
ends the program with a traceback.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import functools
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

from avmm.virtio.devices.net import RX, TX, NetDevice, Tap, build
from fakes.driver_queue import Segment
from fakes.failing_host import Calls, refusing
from fakes.mmio_driver import eventually, readable
from fakes.net_rig import HEADER, RX_GPA, TX_GPA
from fakes.virtio_rig import Rig, virtio_rig

NAME = "avt0"
TYPE = 0x88B5  # for experiments
CANNOT = 77
_CLONE_NEWNET = 0x40000000
_FRAME_BYTES = 60
_ROOM_BYTES = 2048


def frame(number: int) -> bytes:
    """One that no other program sends."""
    return b"\xff" * 6 + b"\x02\0\0\0\0\1" + TYPE.to_bytes(2, "big") + bytes([number]) * 46


def ip(*arguments: str) -> None:
    subprocess.run(["ip", "link", *arguments], check=True)


class Bench:
    """The device's driver, and the host's end of the TAP."""

    def __init__(self, rig: Rig[NetDevice]) -> None:
        self.rig = rig
        self.wire = self.wire_of_tap()

    @staticmethod
    def wire_of_tap() -> socket.socket:
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        wire.bind((NAME, TYPE))
        return wire

    def counter(self, name: str) -> int:
        return self.rig.device.statistics().counters[name]

    async def send(self, *numbers: int) -> None:
        """The driver sends, and gets every buffer back."""
        queue = self.rig.driver.queues[TX]
        for at, number in enumerate(numbers):
            gpa = TX_GPA + at * _ROOM_BYTES
            self.rig.memory.write(gpa, HEADER + frame(number))
            queue.offer(Segment(gpa, len(HEADER) + _FRAME_BYTES))
        self.rig.driver.kick(TX)
        await self.rig.driver.used(TX, len(numbers))

    async def sent(self, count: int) -> list[int]:
        """What the host gets of it."""
        numbers = []
        for _ in range(count):
            await readable(self.wire.fileno())
            numbers.append(self.wire.recv(_ROOM_BYTES)[14])
        return numbers

    def offer(self) -> None:
        self.rig.driver.queues[RX].offer(Segment(RX_GPA, _ROOM_BYTES, writable=True))
        self.rig.driver.kick(RX)

    async def received(self) -> int:
        await self.rig.driver.used(RX)
        return self.rig.memory.read(RX_GPA + len(HEADER) + 14, 1)[0]

    async def rests(self) -> None:
        """Nothing runs any more."""
        while True:
            before = self.runs()
            for _ in range(50):
                await asyncio.sleep(0)
            if self.runs() == before:
                return

    def runs(self) -> int:
        return sum(home.runs for home in self.rig.device.context.homes.statistics())


async def a_frame_for_which_the_host_has_no_room_is_lost_and_counted(bench: Bench) -> None:
    for error in (errno.ENOBUFS, errno.ENOMEM, errno.EIO, errno.EINVAL):
        dropped = bench.counter("tx_dropped")
        with refusing(Calls.SEND, 3, error):
            await bench.send(*range(8))
        assert bench.counter("tx_dropped") == dropped + 1
        assert await bench.sent(7) == [0, 1, 3, 4, 5, 6, 7]
    dropped = bench.counter("tx_dropped")
    with refusing(Calls.SEND, 1, errno.ENOBUFS, lasting=True):
        for _ in range(20):
            await bench.send(*range(8))
        await bench.rests()
    assert bench.counter("tx_dropped") == dropped + 160


async def a_tap_that_cannot_be_read_is_a_cable_that_is_out(bench: Bench) -> None:
    bench.offer()
    with refusing(Calls.RECEIVE, 1, errno.EIO):
        bench.wire.send(frame(1))
        await eventually(lambda: not bench.rig.device.link_up)
    await bench.rests()
    bench.rig.device.set_link(True)
    bench.wire.send(frame(2))
    # The first one waited in the TAP.
    assert await bench.received() == 1
    bench.offer()
    assert await bench.received() == 2
    await bench.send(7)
    assert await bench.sent(1) == [7]


async def without_carrier_frames_are_lost(bench: Bench) -> None:
    dropped = bench.counter("tx_dropped")
    bench.rig.device.set_link(False)
    await bench.send(1, 2)
    bench.rig.device.set_link(True)
    ip("set", NAME, "down")
    await bench.send(3, 4)
    await bench.rests()
    assert bench.counter("tx_dropped") == dropped + 4
    ip("set", NAME, "up")
    bench.wire.close()
    bench.wire = bench.wire_of_tap()
    await bench.send(5)
    assert await bench.sent(1) == [5]
    bench.offer()
    bench.wire.send(frame(6))
    assert await bench.received() == 6


async def a_tap_that_is_removed_costs_the_carrier_only(bench: Bench) -> None:
    dropped = bench.counter("tx_dropped")
    ip("del", NAME)
    await bench.send(0)  # without a buffer to receive, what is sent is the first to find out
    await eventually(lambda: not bench.rig.device.link_up)
    await bench.send(*range(1, 8))
    await bench.rests()
    assert bench.counter("tx_dropped") == dropped + 8
    await bench.rig.device.quiesce()
    await bench.rig.device.resume()
    await bench.rig.driver.start()
    await bench.send(1)
    await bench.rests()


CASES = (
    a_frame_for_which_the_host_has_no_room_is_lost_and_counted,
    a_tap_that_cannot_be_read_is_a_cable_that_is_out,
    without_carrier_frames_are_lost,
    a_tap_that_is_removed_costs_the_carrier_only,
)


async def main(io_threads: int) -> None:
    tap = Tap(NAME, host="10.0.0.1/24")
    async with virtio_rig(functools.partial(build, tap), io_threads=io_threads) as rig:
        await rig.driver.start()
        bench = Bench(rig)
        for case in CASES:
            await case(bench)
            print(case.__name__)
        bench.wire.close()
        assert rig.errors == []


if __name__ == "__main__":
    if ctypes.CDLL(None).unshare(_CLONE_NEWNET) != 0 or not os.access("/dev/net/tun", os.W_OK):
        sys.exit(CANNOT)
    with contextlib.suppress(FileNotFoundError):  # which would send frames of its own
        Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
    logging.disable()
    asyncio.run(main(int(sys.argv[1])))
