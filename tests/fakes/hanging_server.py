"""A program that serves a disk on a file system that hangs to front-ends of another VMM's.

python -m fakes.hanging_server FOLDER ENGINE IO_THREADS: in a mount namespace of its own. What goes
wrong ends it with a traceback.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from avmm.block.raw import RawDisk
from avmm.errors import ConfigError, HostError
from avmm.units import MIB
from avmm.vhost_user.server import VhostUserServer
from avmm.virtio.devices import blk
from avmm.virtio.devices.blk import Disk
from fakes.blk_driver import IN, OK, BlkDriver
from fakes.front_end import FrontEnd, front_end
from fakes.hanging_disk import SHORT_S, hang
from fakes.hanging_fs import HangingFs
from fakes.hanging_fs import hanging_fs as mounted
from fakes.mmio_driver import eventually, settle
from linux.holdings import Holdings

Leave = Callable[[FrontEnd], Awaitable[None]]


def exists(path: str) -> bool:
    return os.path.exists(path)


async def stay(end: FrontEnd) -> None:
    """The front-end waits for its guest's requests."""


async def ask_where_the_ring_stands(end: FrontEnd) -> None:
    asked = asyncio.ensure_future(end.stop_ring(0))
    await settle()
    assert not asked.done()
    asked.cancel()
    await asyncio.wait([asked])


async def go_away(end: FrontEnd) -> None:
    end.socket.shutdown(2)
    await settle()


async def a_front_end_waits_and_the_loop_does_not(
    disk: Disk, path: str, fs: HangingFs, io_threads: int
) -> None:
    async with VhostUserServer(disk, path, io_threads=io_threads) as server:
        async with front_end(path) as end:
            await end.start()
            slots = await hang(end, fs)
            stopped = asyncio.ensure_future(end.stop_ring(0))
            await settle()
            assert not stopped.done()
            fs.go()
            base = await stopped
            assert len(end.queues[0].take_used()) == 2
            assert base == end.queues[0].base
            assert [BlkDriver(end).status(slot) for slot in slots] == [OK, OK]
        async with front_end(path) as end:
            await end.start()
            await hang(end, fs)
        async with front_end(path) as end:
            started = asyncio.ensure_future(end.start())
            await settle()
            assert not started.done()
            assert server.statistics().connections == 2
            fs.go()
            await started
            assert (await BlkDriver(end).request(IN, read_bytes=512))[0] == OK


async def a_stop_leaves_it_to_itself(
    disk: Disk, path: str, fs: HangingFs, io_threads: int, leave: Leave
) -> None:
    before = Holdings.now()
    server = await VhostUserServer(disk, path, io_threads=io_threads).__aenter__()
    async with front_end(path) as end:
        await end.start()
        await hang(end, fs)
        await leave(end)
        with pytest.raises(HostError, match=disk.path) as caught:
            await server.__aexit__()
        assert caught.value.kind == "disk-hangs"
        assert await end.closed()
    assert not exists(path)
    held = Holdings.now().beyond(before)
    assert held["thread avmm-late"] == 1
    assert held["mapping /memfd:guest (deleted)"] == 1
    assert held["descriptor anon_inode:[eventfd]"] == 1  # the engine's
    assert not any("socket" in name for name in held)
    with pytest.raises(ConfigError, match="in use"):
        RawDisk.open(disk.path, read_only=False, direct=False)
    (late,) = [thread for thread in threading.enumerate() if thread.name == "avmm-late"]
    fs.go()
    late.join()
    await eventually(lambda: not Holdings.now().beyond(before))


async def main(folder: Path, engine: str, io_threads: int) -> None:
    blk.HANG_S = SHORT_S
    path = str(folder.with_name("s"))
    with mounted(folder, MIB) as fs:
        for pinned in {False, engine == "io_uring"}:
            disk = Disk(str(fs.disk), engine=engine, pinned=pinned, queues=1)  # type: ignore[arg-type]
            await a_front_end_waits_and_the_loop_does_not(disk, path, fs, io_threads)
            for leave in (stay, ask_where_the_ring_stands, go_away):
                await a_stop_leaves_it_to_itself(disk, path, fs, io_threads, leave)
    print("done")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
