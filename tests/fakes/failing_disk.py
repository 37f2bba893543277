"""A program that serves a disk on a failing_host, and looks at what becomes of each failure.

python -m fakes.failing_disk IMAGE ENGINE IO_THREADS [full]: the first failure that becomes anything
else than it should ends the program with a traceback. full: the file system of IMAGE has less room
than the disk, and nothing else fails.
"""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from avmm.errors import ConfigError
from avmm.units import KIB
from avmm.virtio import features
from avmm.virtio.devices.blk import BlkDevice, Disk, build
from fakes.blk_driver import DISCARD, FLUSH, IN, IOERR, OK, OUT, WRITE_ZEROES, BlkDriver
from fakes.driver_queue import Segment
from fakes.failing_host import SHORT, Calls, refusing
from fakes.virtio_rig import DATA_GPA, Rig, virtio_rig

BLOCK = 12 * KIB
BATCH = 8
NO_ERRORS = (errno.EINTR, errno.EAGAIN)
"""What is to be tried again."""


class Bench:
    """A disk in use. image: the file behind it."""

    def __init__(self, rig: Rig[BlkDevice], image: Path) -> None:
        self.rig = rig
        self.blk = BlkDriver(rig)
        self.image = image

    async def write(self, sector: int, data: bytes) -> int:
        return (await self.blk.request(OUT, sector, data))[0]

    async def read(self, sector: int, size: int) -> tuple[int, bytes]:
        return await self.blk.request(IN, sector, read_bytes=size)

    async def flush(self, queue: int = 0) -> int:
        return (await self.blk.request(FLUSH, queue=queue))[0]

    async def on_range(self, kind: int, sector: int, sectors: int) -> int:
        entry = sector.to_bytes(8, "little") + sectors.to_bytes(4, "little") + bytes(4)
        return (await self.blk.request(kind, data=entry))[0]

    def content(self, sector: int, size: int) -> bytes:
        return self.image.read_bytes()[sector * 512 : sector * 512 + size]


Case = Callable[[Bench], Awaitable[None]]


async def one_of_many_reads_fails_and_the_others_do_not(bench: Bench) -> None:
    data = os.urandom(BLOCK)
    assert await bench.write(0, data) == OK
    for error in (errno.EIO, errno.ENOMEM, errno.EBADF):
        with refusing(Calls.READ, 3, error):
            slots = [bench.blk.submit(IN, read_bytes=BLOCK) for _ in range(BATCH)]
            bench.blk.kick()
            await bench.rig.driver.used(0, BATCH)
        assert Counter(map(bench.blk.status, slots)) == {OK: BATCH - 1, IOERR: 1}
        assert await bench.read(0, BLOCK) == (OK, data)


async def one_of_many_writes_fails_and_the_others_are_in_the_file(bench: Bench) -> None:
    for error in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG):
        blocks = [os.urandom(BLOCK) for _ in range(BATCH)]
        sectors = range(0, BATCH * BLOCK // 512, BLOCK // 512)
        before = [bench.content(sector, BLOCK) for sector in sectors]
        with refusing(Calls.WRITE, 5, error):
            slots = [bench.blk.submit(OUT, *each) for each in zip(sectors, blocks, strict=True)]
            bench.blk.kick()
            await bench.rig.driver.used(0, BATCH)
        statuses = list(map(bench.blk.status, slots))
        assert Counter(statuses) == {OK: BATCH - 1, IOERR: 1}
        for status, sector, new, old in zip(statuses, sectors, blocks, before, strict=True):
            assert bench.content(sector, BLOCK) == (new if status == OK else old)
        assert await bench.flush() == OK


async def what_is_done_in_part_is_finished(bench: Bench) -> None:
    for at, lasting in ((1, False), (2, False), (1, True)):
        data = os.urandom(BLOCK)
        with refusing(Calls.WRITE, at, SHORT, lasting=lasting):
            assert await bench.write(0, data) == OK
        with refusing(Calls.READ, at, SHORT, lasting=lasting):
            assert await bench.read(0, BLOCK) == (OK, data)
        assert bench.content(0, BLOCK) == data


async def segments_done_in_part_are_finished(bench: Bench) -> None:
    memory, queue = bench.rig.memory, bench.rig.driver.queues[0]
    data = os.urandom(4 * KIB)
    pieces = (512, 1024, 2048, 512)
    for kind, calls, writable in ((OUT, Calls.WRITE, False), (IN, Calls.READ, True)):
        memory.write(DATA_GPA, kind.to_bytes(4, "little") + bytes(12))
        memory.write(DATA_GPA + 0x1000, bytes(len(data)) if writable else data)
        at, segments = DATA_GPA + 0x1000, [Segment(DATA_GPA, 16)]
        for size in pieces:
            segments.append(Segment(at, size, writable=writable))
            at += size
        queue.offer(*segments, Segment(DATA_GPA + 16, 1, writable=True))
        with refusing(calls, 1, SHORT, lasting=True) as refusals:
            bench.blk.kick()
            await bench.rig.driver.used(0)
        assert refusals.seen > 1
        assert memory.read(DATA_GPA + 16, 1) == bytes([OK])
        assert memory.read(DATA_GPA + 0x1000, len(data)) == data
    assert bench.content(0, len(data)) == data


async def what_was_interrupted_is_tried_again(bench: Bench) -> None:
    for error in NO_ERRORS:
        data = os.urandom(BLOCK)
        with refusing(Calls.WRITE | Calls.READ | Calls.SYNC, 1, error) as refusals:
            assert await bench.write(0, data) == OK
        assert (refusals.failed, refusals.seen) == (1, 2)
        with refusing(Calls.READ, 1, error):
            assert await bench.read(0, BLOCK) == (OK, data)
        with refusing(Calls.SYNC, 1, error):
            assert await bench.flush() == OK
        with refusing(Calls.ALLOCATE, 1, error):
            assert await bench.on_range(DISCARD, 0, 8) == OK


async def what_is_interrupted_for_ever_is_an_error(bench: Bench) -> None:
    for error in NO_ERRORS:
        with refusing(Calls.WRITE | Calls.SYNC, 1, error, lasting=True):
            assert await bench.write(0, bytes(BLOCK)) == IOERR
            slot = bench.blk.submit(FLUSH)
            bench.blk.kick()
            await bench.rig.device.quiesce()
            assert bench.blk.status(slot) in (IOERR, 0xFF)  # at rest before it was taken
        await bench.rig.device.resume()
        await bench.rig.driver.used(0)


async def after_a_flush_that_failed_none_is_acknowledged(bench: Bench) -> None:
    """What the host could not write it has forgotten, and the next flush would succeed without."""
    for error in (errno.EIO, errno.ENOSPC):
        data = os.urandom(BLOCK)
        assert await bench.write(0, data) == OK
        with refusing(Calls.SYNC, 1, error):
            assert await bench.flush(1) == IOERR
        assert [await bench.flush(queue) for queue in (0, 1)] == [IOERR, IOERR]
        assert await bench.read(0, BLOCK) == (OK, data)
        assert await bench.write(0, data) == OK
    await bench.rig.driver.start()
    assert await bench.flush() == IOERR


async def without_a_cache_a_write_whose_flush_fails_is_an_error(bench: Bench) -> None:
    await bench.rig.driver.start(features.VERSION_1)
    with refusing(Calls.SYNC, 1, errno.EIO):
        assert await bench.write(0, bytes(BLOCK)) == IOERR
    assert await bench.write(0, bytes(BLOCK)) == IOERR
    assert (await bench.read(0, BLOCK))[0] == OK


async def room_that_cannot_be_given_back_is_an_error(bench: Bench) -> None:
    for kind in (DISCARD, WRITE_ZEROES):
        for error in (errno.EIO, errno.ENOSPC):
            with refusing(Calls.ALLOCATE, 1, error):
                assert await bench.on_range(kind, 0, 8) == IOERR
            assert await bench.on_range(kind, 0, 8) == OK


async def without_fallocate_zeroes_are_written(bench: Bench) -> None:
    sectors = 200 * KIB // 512
    assert await bench.write(0, os.urandom(BLOCK)) == OK
    with refusing(Calls.ALLOCATE, 1, errno.EOPNOTSUPP, lasting=True):
        assert await bench.on_range(DISCARD, 0, sectors) == OK
        with refusing(Calls.ALLOCATE, 1, errno.EOPNOTSUPP, lasting=True):
            assert await bench.on_range(WRITE_ZEROES, 0, sectors) == OK
    assert bench.content(0, 200 * KIB) == bytes(200 * KIB)


async def a_full_file_system_takes_no_more_and_keeps_what_it_has(bench: Bench) -> None:
    kept: dict[int, bytes] = {}
    refused = []
    for sector in range(0, bench.image.stat().st_size // 512, BLOCK // 512):
        data = os.urandom(BLOCK)
        if await bench.write(sector, data) == OK:
            kept[sector] = data
        else:
            refused.append(sector)
    assert kept
    assert refused
    assert await bench.flush() == OK
    for sector, data in kept.items():
        assert await bench.read(sector, BLOCK) == (OK, data)
        assert bench.content(sector, BLOCK) == data
    assert await bench.write(min(kept), bytes(BLOCK)) == OK
    assert await bench.on_range(DISCARD, min(kept), BLOCK // 512) == OK
    assert await bench.write(refused[0], bytes(BLOCK)) == OK
    assert await bench.flush() == OK


CASES: tuple[Case, ...] = (
    one_of_many_reads_fails_and_the_others_do_not,
    one_of_many_writes_fails_and_the_others_are_in_the_file,
    what_is_done_in_part_is_finished,
    segments_done_in_part_are_finished,
    what_was_interrupted_is_tried_again,
    what_is_interrupted_for_ever_is_an_error,
    after_a_flush_that_failed_none_is_acknowledged,
    without_a_cache_a_write_whose_flush_fails_is_an_error,
    room_that_cannot_be_given_back_is_an_error,
    without_fallocate_zeroes_are_written,
)
DIRECT_CASES: tuple[Case, ...] = (
    one_of_many_writes_fails_and_the_others_are_in_the_file,
    without_fallocate_zeroes_are_written,
)
"""Of a disk without a page cache as well."""


@asynccontextmanager
async def bench_of(
    image: Path, engine: str, io_threads: int, *, direct: bool = False
) -> AsyncIterator[Bench]:
    disk = Disk(str(image), engine=engine, direct=direct)  # type: ignore[arg-type]
    async with virtio_rig(
        lambda context: build(disk, context), io_threads=io_threads, cpus=2
    ) as rig:
        await rig.driver.start()
        yield Bench(rig, image)
        assert rig.errors == []
        await rig.device.quiesce()


async def main(image: str, engine: str, io_threads: int, cases: tuple[Case, ...]) -> None:
    for case in cases:
        async with bench_of(Path(image), engine, io_threads) as bench:
            await case(bench)
        print(case.__name__)


async def main_direct(image: str, engine: str, io_threads: int) -> None:
    for case in DIRECT_CASES:
        try:
            async with bench_of(Path(image), engine, io_threads, direct=True) as bench:
                await case(bench)
        except ConfigError as e:
            print(e)


if __name__ == "__main__":
    _, image, engine, io_threads, *full = sys.argv
    cases = (a_full_file_system_takes_no_more_and_keeps_what_it_has,) if full else CASES
    asyncio.run(main(image, engine, int(io_threads), cases))
    if not full:
        asyncio.run(main_direct(image, engine, int(io_threads)))
