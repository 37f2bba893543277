"""A write that takes as long as the test wants: what waits for it before memory goes."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from avmm.vhost_user.server import VhostUserServer
from avmm.virtio.devices.blk import Disk
from fakes.blk_driver import IN, OK, OUT, BlkDriver
from fakes.front_end import FrontEnd, front_end
from fakes.mmio_driver import eventually, settle
from fakes.pipe_disk import Stuck


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
