"""virtio-blk with several queues: who serves them, what they share, what they do not."""

from __future__ import annotations

import asyncio
import os
import struct
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from avmm.errors import ConfigError
from avmm.units import KIB, MIB
from avmm.virtio import features
from avmm.virtio.devices.blk import QUEUES_MAX, BlkDevice, Disk, build
from avmm.virtio.state import DEVICE_NEEDS_RESET
from avmm.virtio.transport import mmio
from fakes.blk_driver import FLUSH, IN, OK, OUT, BlkDriver
from fakes.driver_queue import Segment
from fakes.mmio_driver import eventually
from fakes.virtio_rig import DATA_GPA, Rig, virtio_rig

SIZE_BYTES = 4 * MIB
NUM_QUEUES = mmio.CONFIG + 34


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE_BYTES))
    return path


def contents(image: Path) -> bytes:
    return image.read_bytes()


@asynccontextmanager
async def on_threads(
    image: Path, *, queues: int, io_threads: int, **options: object
) -> AsyncIterator[tuple[Rig[BlkDevice], BlkDriver]]:
    disk = Disk(str(image), queues=queues, **options)  # type: ignore[arg-type]
    async with virtio_rig(lambda context: build(disk, context), io_threads=io_threads) as rig:
        await rig.driver.start()
        yield rig, BlkDriver(rig)
        assert rig.errors == []


@pytest.mark.parametrize(("cpus", "queues"), [(1, 1), (3, 3), (200, QUEUES_MAX)])
async def test_a_disk_has_a_queue_for_each_vcpu_up_to_a_bound(
    image: Path, cpus: int, queues: int
) -> None:
    async with virtio_rig(lambda context: build(Disk(str(image)), context), cpus=cpus) as rig:
        await rig.driver.start()
        assert len(rig.driver.queues) == queues
        assert rig.driver.read(NUM_QUEUES, 2) == queues
        assert bool(await rig.driver.read_features() & features.BLK_MQ) == (queues > 1)


@pytest.mark.parametrize("queues", [0, QUEUES_MAX + 1])
def test_a_number_of_queues_out_of_bounds_is_refused(queues: int) -> None:
    with pytest.raises(ConfigError, match=rf"queues={queues} is not in 1 to {QUEUES_MAX}"):
        Disk("disk.img", queues=queues)


@pytest.mark.parametrize("size", [8, 100, 2048])
def test_a_queue_size_that_no_queue_can_have_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"queue_size={size} is not a power of two"):
        Disk("disk.img", queue_size=size)


@pytest.mark.parametrize(("size", "seg_max"), [(16, 14), (1024, 126)])
async def test_a_request_with_all_its_segments_fits_into_a_queue(
    image: Path, size: int, seg_max: int
) -> None:
    async with on_threads(image, queues=1, io_threads=0, queue_size=size) as (rig, _):
        assert rig.driver.read(mmio.CONFIG + 12) == seg_max
        await rig.driver.write(mmio.QUEUE_SEL, 0)
        assert rig.driver.read(mmio.QUEUE_SIZE_MAX) == size
        rig.memory.write(DATA_GPA, struct.pack("<IIQ", IN, 0, 0))
        rig.driver.queues[0].offer_indirect(
            DATA_GPA + 0x1000,
            Segment(DATA_GPA, 16),
            *(Segment(DATA_GPA + 0x10000 + 512 * i, 512, writable=True) for i in range(seg_max)),
            Segment(DATA_GPA + 0x20, 1, writable=True),
        )
        rig.driver.kick(0)
        assert await rig.driver.used(0) == [(0, 512 * seg_max + 1)]
        assert rig.memory.read(DATA_GPA + 0x20, 1) == bytes([OK])
        read = rig.memory.read(DATA_GPA + 0x10000, 512 * seg_max)
    assert read == contents(image)[: 512 * seg_max]


@pytest.mark.parametrize("io_threads", [0, 1, 2, 3])
async def test_each_queue_is_served_whoever_serves_it(image: Path, io_threads: int) -> None:
    before = contents(image)
    async with on_threads(image, queues=3, io_threads=io_threads) as (rig, blk):
        for queue in range(3):
            data = bytes([queue + 1]) * 4 * KIB
            assert await blk.request(OUT, 8 * queue, data, queue=queue) == (OK, b"")
            assert await blk.request(IN, 64, read_bytes=512, queue=queue) == (
                OK,
                before[32 * KIB : 32 * KIB + 512],
            )
        statistics = rig.device.statistics()
        assert [queue.chains for queue in statistics.queues] == [2, 2, 2]
        assert (statistics.counters["writes"], statistics.counters["reads"]) == (3, 3)
    assert contents(image)[: 12 * KIB] == b"".join(bytes([i]) * 4 * KIB for i in (1, 2, 3))


async def test_kicks_from_several_threads_at_once_lose_nothing(image: Path) -> None:
    """As vCPUs do it: each has its queue, and none waits for another."""
    async with on_threads(image, queues=4, io_threads=2) as (rig, blk):
        written: dict[int, bytes] = {}
        for turn in range(10):
            for queue in range(4):
                for i in range(4):
                    sector = 8 * (turn * 16 + queue * 4 + i)
                    written[sector] = os.urandom(512)
                    blk.submit(OUT, sector, written[sector], queue=queue)
            start = threading.Barrier(4)

            def kick(queue: int, start: threading.Barrier = start) -> None:
                start.wait()
                blk.kick(queue)

            await asyncio.gather(*(asyncio.to_thread(kick, queue) for queue in range(4)))
            taken = [0] * 4
            while sum(taken) < 16:
                await rig.driver.interrupted()
                for queue in range(4):
                    taken[queue] += len(rig.driver.queues[queue].take_used())
            assert taken == [4] * 4
        assert (await blk.request(FLUSH))[0] == OK
    found = contents(image)
    for sector, data in written.items():
        assert found[512 * sector : 512 * (sector + 1)] == data


async def test_a_fault_on_one_queue_stops_all_of_its_device_and_no_other(
    image: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(bytes(SIZE_BYTES))
    async with (
        on_threads(image, queues=2, io_threads=1) as (rig, blk),
        on_threads(other, queues=2, io_threads=1) as (_, other_blk),
    ):
        assert (await blk.request(FLUSH, queue=1))[0] == OK
        fault = rig.driver.queues[0].offer_broken()
        blk.kick(0)
        await eventually(lambda: rig.device.statistics().last_fault == fault)
        assert rig.driver.read(mmio.STATUS) & DEVICE_NEEDS_RESET
        slot = blk.submit(FLUSH, queue=1)
        blk.kick(1)
        assert (await other_blk.request(OUT, 0, b"x" * 512, queue=1))[0] == OK
        await rig.device.quiesce()
        assert blk.status(slot) == 0xFF
        await rig.device.resume()
        await rig.driver.start()
        for queue in range(2):
            assert (await blk.request(FLUSH, queue=queue))[0] == OK


async def test_resize_reaches_every_queue_while_they_run(image: Path) -> None:
    async with on_threads(image, queues=2, io_threads=2) as (rig, blk):
        os.truncate(image, 2 * SIZE_BYTES)
        for queue in range(2):
            slots = [blk.submit(OUT, 8 * i, b"x" * 4096, queue=queue) for i in range(8)]
            blk.kick(queue)
            if queue == 0:
                rig.device.resize()
            await rig.driver.used(queue, 8)
            assert {blk.status(slot) for slot in slots} == {OK}
        last = 2 * SIZE_BYTES // 512 - 1
        for queue in range(2):
            assert (await blk.request(OUT, last, b"y" * 512, queue=queue))[0] == OK
    assert contents(image)[-512:] == b"y" * 512
