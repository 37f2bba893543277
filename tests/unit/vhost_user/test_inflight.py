"""A write that takes as long as the test wants: what waits for it before memory goes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest

from avmm.errors import HostError
from avmm.units import KIB, MIB
from avmm.vhost_user.server import VhostUserServer
from avmm.virtio.devices.blk import BLK, BlkDevice, Disk
from avmm.virtio.devtype import DeviceContext, DeviceType
from fakes.blk_driver import IN, OK, OUT, BlkDriver
from fakes.front_end import FrontEnd, front_end
from fakes.mmio_driver import eventually, settle
from fakes.pipe_disk import PipeDisk


@dataclass(frozen=True)
class Stuck:
    """A served disk that writes to a full pipe: drain() lets its writes end."""

    server: VhostUserServer
    read_fd: int
    write_fd: int

    def fill(self) -> None:
        os.set_blocking(self.write_fd, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(self.write_fd, bytes(4 * KIB))
        os.set_blocking(self.write_fd, True)

    def drain(self) -> None:
        os.set_blocking(self.read_fd, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.read(self.read_fd, MIB)


@pytest.fixture
async def stuck(socket_path: str) -> AsyncIterator[Stuck]:
    read_fd, write_fd = os.pipe()

    async def build(config: Disk, context: DeviceContext) -> BlkDevice:
        return BlkDevice(config, PipeDisk(write_fd), context)

    class OnAPipe(Disk, frozen=True):
        device_type: ClassVar[DeviceType] = replace(BLK, build=build)

    try:
        async with VhostUserServer(OnAPipe("pipe", engine="io_uring"), socket_path) as server:
            disk = Stuck(server, read_fd, write_fd)
            disk.fill()
            yield disk
            disk.drain()  # a test that failed must not leave the server's end waiting
    except HostError as e:
        if e.kind == "disk-engine":
            pytest.skip(f"no io_uring here: {e}")
        raise
    finally:
        os.close(read_fd)
        os.close(write_fd)


async def started(end: FrontEnd, server: VhostUserServer) -> tuple[BlkDriver, int]:
    """A front-end with a write in flight, and the write's slot."""
    await end.start()
    blk = BlkDriver(end)
    slot = blk.submit(OUT, 0, b"x" * 512)
    blk.kick()
    await eventually(lambda: server.statistics().device.queues[0].chains == 1)
    assert blk.status(slot) == 0xFF
    return blk, slot


async def test_get_vring_base_waits_for_what_is_in_flight(stuck: Stuck) -> None:
    async with front_end(stuck.server.socket_path) as end:
        blk, slot = await started(end, stuck.server)
        stopped = asyncio.ensure_future(end.stop_ring(0))
        await settle()
        assert not stopped.done()
        stuck.drain()
        base = await stopped
        assert len(end.queues[0].take_used()) == 1
        assert base == end.queues[0].base
        assert blk.status(slot) == OK


async def test_a_new_memory_table_waits_for_what_is_in_flight(stuck: Stuck) -> None:
    async with front_end(stuck.server.socket_path) as end:
        blk, slot = await started(end, stuck.server)
        moved = asyncio.ensure_future(end.set_memory())
        await settle()
        assert not moved.done()
        stuck.drain()
        assert await moved == 0
        await end.used(0)
        assert blk.status(slot) == OK


def mappings() -> int:
    with open("/proc/self/maps") as maps:
        return sum("memfd:guest" in line for line in maps)


async def test_memory_is_not_unmapped_under_a_write(stuck: Stuck) -> None:
    before = mappings()
    async with front_end(stuck.server.socket_path) as end:
        await started(end, stuck.server)
    await settle()
    assert mappings() == before + 1
    next_one = asyncio.ensure_future(connect_and_ask(stuck.server.socket_path))
    await settle()
    assert not next_one.done()
    stuck.drain()
    await next_one
    assert mappings() == before


async def connect_and_ask(path: str) -> None:
    async with front_end(path) as end:
        await end.negotiate()


async def test_a_server_ends_with_a_front_end_and_its_write(stuck: Stuck) -> None:
    async with front_end(stuck.server.socket_path) as end:
        blk, slot = await started(end, stuck.server)
        ended = asyncio.ensure_future(stuck.server.__aexit__())
        await settle()
        assert not ended.done()
        stuck.drain()
        await ended
        assert blk.status(slot) == OK
        assert await end.closed()


async def test_a_callback_that_takes_long_does_not_stall_the_thread(
    image: Path, socket_path: str
) -> None:
    async with (
        VhostUserServer(Disk(str(image)), socket_path, io_threads=1) as server,
        front_end(server.socket_path) as end,
    ):
        await end.start()
        blk = BlkDriver(end)
        late = time.monotonic() + 20
        # From here on the loop has no turn, and requests are done all the same.
        for _ in range(100):
            slot = blk.submit(IN, read_bytes=512)
            blk.kick()
            while blk.status(slot) != OK:
                assert time.monotonic() < late
            while not end.queues[0].take_used():
                assert time.monotonic() < late
