"""virtio-blk over real rings, real engines and a file."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from avmm.block.raw import RawDisk
from avmm.errors import BugError, ConfigError, HostError
from avmm.units import KIB, MIB
from avmm.virtio import features
from avmm.virtio.devices.blk import BlkDevice, Disk, build
from avmm.virtio.interrupt import CONFIG_CHANGE
from avmm.virtio.state import DEVICE_NEEDS_RESET
from avmm.virtio.transport import mmio
from fakes.blk_driver import (
    DISCARD,
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    OK,
    OUT,
    UNSUPP,
    WRITE_ZEROES,
    BlkDriver,
)
from fakes.driver_queue import Segment
from fakes.mmio_driver import eventually, settle
from fakes.virtio_rig import DATA_GPA, Rig, virtio_rig

SIZE_BYTES = 4 * MIB
WRITEBACK = mmio.CONFIG + 32
BLK_SECURE_ERASE = 1 << 16
Plugged = Callable[..., AbstractAsyncContextManager[tuple[Rig[BlkDevice], BlkDriver]]]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(SIZE_BYTES)
    return path


def contents(image: Path) -> bytes:
    return image.read_bytes()


def fill(image: Path, data: bytes) -> None:
    image.write_bytes(data)


@pytest.fixture(params=[("io_uring", 0), ("io_uring", 1), ("threads", 0), ("threads", 1)], ids=str)
def plugged(image: Path, request: pytest.FixtureRequest) -> Plugged:
    """A started disk on `image`, by each engine and on each kind of home."""
    engine, io_threads = request.param

    @asynccontextmanager
    async def plugged(
        accept: int | None = None, **options: object
    ) -> AsyncIterator[tuple[Rig[BlkDevice], BlkDriver]]:
        disk = Disk(str(image), engine=engine, **options)  # type: ignore[arg-type]
        try:
            async with virtio_rig(
                lambda context: build(disk, context), io_threads=io_threads
            ) as rig:
                await rig.driver.start(accept)
                yield rig, BlkDriver(rig)
                assert rig.errors == []
        except HostError as e:
            if engine == "io_uring" and e.kind == "disk-engine":
                pytest.skip(f"no io_uring here: {e}")
            raise

    return plugged


async def test_what_is_written_is_read_back_and_is_in_the_file(
    plugged: Plugged, image: Path
) -> None:
    data = os.urandom(12 * KIB)
    async with plugged() as (rig, blk):
        assert await blk.request(OUT, 8, data) == (OK, b"")
        assert await blk.request(FLUSH) == (OK, b"")
        assert await blk.request(IN, 8, read_bytes=len(data)) == (OK, data)
        counters = rig.device.statistics().counters
        assert (counters["writes"], counters["reads"], counters["flushes"]) == (1, 1, 1)
        assert counters["write_bytes"] == counters["read_bytes"] == len(data)
    assert contents(image)[4 * KIB : 16 * KIB] == data


async def test_more_requests_than_the_engine_is_deep_all_complete(plugged: Plugged) -> None:
    async with plugged() as (rig, blk):
        for turn in range(20):
            slots = [blk.submit(OUT, 8 * i, bytes([turn + 1]) * 512) for i in range(16)]
            blk.kick()
            await rig.driver.used(0, 16)
            assert {blk.status(slot) for slot in slots} == {OK}


async def test_a_request_through_an_indirect_table(plugged: Plugged, image: Path) -> None:
    async with plugged() as (rig, _):
        rig.memory.write(DATA_GPA, struct.pack("<IIQ", OUT, 0, 1) + b"x" * 512)
        rig.driver.queues[0].offer_indirect(
            DATA_GPA + 0x1000,
            Segment(DATA_GPA, 100),
            Segment(DATA_GPA + 100, 428),
            Segment(DATA_GPA + 0x2000, 1, writable=True),
        )
        rig.driver.kick(0)
        assert await rig.driver.used(0) == [(0, 1)]
    assert contents(image)[512:1024] == b"x" * 512


@pytest.mark.parametrize(
    ("kind", "sector", "data", "expected"),
    [
        (OUT, SIZE_BYTES // 512, b"\1" * 512, IOERR),
        (OUT, SIZE_BYTES // 512 - 1, b"\1" * 1024, IOERR),
        (OUT, 2**64 - 1, b"\1" * 512, IOERR),
        (OUT, 0, b"\1" * 100, IOERR),
        (99, 0, b"", UNSUPP),
    ],
)
async def test_bad_requests_complete_with_an_error(
    plugged: Plugged, kind: int, sector: int, data: bytes, expected: int
) -> None:
    async with plugged() as (rig, blk):
        assert (await blk.request(kind, sector, data))[0] == expected
        assert rig.device.statistics().faults == 0


async def test_a_request_without_room_for_a_status_is_a_fault(plugged: Plugged) -> None:
    async with plugged() as (rig, blk):
        rig.driver.queues[0].offer(Segment(DATA_GPA, 16))
        blk.kick()
        assert await rig.driver.interrupted() == CONFIG_CHANGE
        assert rig.driver.read(mmio.STATUS) & DEVICE_NEEDS_RESET
        assert rig.device.statistics().last_fault == "request"
        await rig.driver.start()
        assert (await blk.request(FLUSH))[0] == OK


async def test_discard_and_write_zeroes_leave_zeroes(plugged: Plugged, image: Path) -> None:
    fill(image, b"\xff" * SIZE_BYTES)
    blocks = os.stat(image).st_blocks
    async with plugged() as (_, blk):
        assert (await blk.request(DISCARD, 0, struct.pack("<QII", 8, 8, 0)))[0] == OK
        assert (await blk.request(WRITE_ZEROES, 0, struct.pack("<QII", 24, 8, 1)))[0] == OK
    assert os.stat(image).st_blocks == blocks - 16  # both left holes
    data = contents(image)
    assert data[4 * KIB : 8 * KIB] == bytes(4 * KIB)
    assert data[12 * KIB : 16 * KIB] == bytes(4 * KIB)
    assert data.count(b"\xff") == SIZE_BYTES - 8 * KIB


async def test_zeroes_are_written_where_the_host_cannot_zero() -> None:
    """A tmpfs has holes, but no FALLOC_FL_ZERO_RANGE."""
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK):
        pytest.skip("no /dev/shm")
    with tempfile.NamedTemporaryFile(dir=shm) as file:
        file.write(b"\xff" * SIZE_BYTES)
        file.flush()
        async with virtio_rig(lambda context: build(Disk(file.name), context)) as rig:
            await rig.driver.start()
            blk = BlkDriver(rig)
            ranges = struct.pack("<QIIQII", 1, 2001, 0, 4000, 8, 0)
            assert (await blk.request(WRITE_ZEROES, 0, ranges))[0] == OK
            assert (await blk.request(FLUSH))[0] == OK
        data = contents(Path(file.name))
    assert data[512 : 2002 * 512] == bytes(2001 * 512)
    assert data[4000 * 512 : 4008 * 512] == bytes(8 * 512)
    assert data.count(b"\xff") == SIZE_BYTES - 2009 * 512


async def test_the_configuration_describes_the_disk(plugged: Plugged, image: Path) -> None:
    async with plugged() as (rig, _):
        assert rig.driver.read(mmio.CONFIG, 8) == SIZE_BYTES // 512
        assert rig.driver.read(mmio.CONFIG + 12) == 126  # seg_max
        assert rig.driver.read(mmio.CONFIG + 20) == 512  # blk_size
        block_bytes = os.stat(image).st_blksize
        assert 512 << rig.driver.read(mmio.CONFIG + 24, 1) == min(block_bytes, 4096)
        assert rig.driver.read(mmio.CONFIG + 25, 1) == 0  # alignment_offset
        assert rig.driver.read(mmio.CONFIG + 26, 2) == block_bytes // 512  # min_io_size
        assert rig.driver.read(mmio.CONFIG + 28) == 0  # opt_io_size
        assert rig.driver.read(WRITEBACK, 1) == 1
        assert rig.driver.read(mmio.CONFIG + 34, 2) == 1  # num_queues
        assert rig.driver.read(mmio.CONFIG + 36) == 0xFFFF_FFFF  # max_discard_sectors
        offered = await rig.driver.read_features()
        assert offered & features.BLK_DISCARD
        assert offered & features.BLK_TOPOLOGY
        assert not offered & (features.BLK_MQ | BLK_SECURE_ERASE)
        assert not offered & features.BLK_RO


async def test_a_read_only_disk_refuses_to_change(plugged: Plugged, image: Path) -> None:
    async with plugged(read_only=True) as (rig, blk):
        offered = await rig.driver.read_features()
        assert offered & features.BLK_RO
        assert not offered & (features.BLK_DISCARD | features.BLK_WRITE_ZEROES)
        assert (await blk.request(OUT, 0, b"x" * 512))[0] == IOERR
        assert (await blk.request(DISCARD, 0, struct.pack("<QII", 0, 8, 0)))[0] == UNSUPP
        assert await blk.request(IN, 0, read_bytes=512) == (OK, bytes(512))
    assert contents(image) == bytes(SIZE_BYTES)


@pytest.mark.parametrize(("serial", "expected"), [("S-1", b"S-1"), (None, b"test0")])
async def test_get_id_gives_the_serial_or_else_the_id(
    plugged: Plugged, serial: str | None, expected: bytes
) -> None:
    async with plugged(serial=serial) as (_, blk):
        assert await blk.request(GET_ID, read_bytes=20) == (OK, expected.ljust(20, b"\0"))


async def test_direct_takes_memory_that_is_not_aligned(plugged: Plugged, image: Path) -> None:
    try:
        RawDisk.open(str(image), read_only=False, direct=True).close()
    except ConfigError as e:
        pytest.skip(str(e))
    fill(image, os.urandom(SIZE_BYTES))
    async with plugged(direct=True) as (rig, _):
        block_bytes = rig.driver.read(mmio.CONFIG + 20)
        rig.memory.write(DATA_GPA, struct.pack("<IIQ", IN, 0, 0))
        rig.driver.queues[0].offer(
            Segment(DATA_GPA, 16),
            Segment(DATA_GPA + 0x1003, block_bytes, writable=True),
            Segment(DATA_GPA + 0x100, 1, writable=True),
        )
        rig.driver.kick(0)
        await rig.driver.used(0)
        assert rig.memory.read(DATA_GPA + 0x100, 1) == bytes([OK])
        read = rig.memory.read(DATA_GPA + 0x1003, block_bytes)
        assert rig.device.statistics().counters["bounced"] == 1
    assert read == contents(image)[:block_bytes]


async def test_of_a_large_request_only_a_part_is_held_aligned(image: Path) -> None:
    """Which names the same page again and again."""
    os.truncate(image, 64 * MIB)
    with image.open("r+b") as file:
        file.seek(60 * MIB - 4 * KIB)
        file.write(b"e" * 4 * KIB)
    disk = Disk(str(image), direct=True)
    try:
        async with virtio_rig(lambda context: build(disk, context)) as rig:
            await rig.driver.start()
            before = peak_kib(reset=True)
            rig.memory.write(DATA_GPA, struct.pack("<IIQ", IN, 0, 0))
            rig.driver.queues[0].offer(
                Segment(DATA_GPA, 16),
                *[Segment(DATA_GPA + 0x1003, 2 * MIB, writable=True)] * 30,
                Segment(DATA_GPA + 0x100, 1, writable=True),
            )
            rig.driver.kick(0)
            await rig.driver.used(0)
            assert rig.memory.read(DATA_GPA + 0x100, 1) == bytes([OK])
            last = rig.memory.read(DATA_GPA + 0x1003 + 2 * MIB - 8 * KIB, 8 * KIB)
            assert last == bytes(4 * KIB) + b"e" * 4 * KIB
            assert rig.device.statistics().counters["bounced"] == 1
            assert peak_kib() - before < 16 * KIB
    except ConfigError as e:
        pytest.skip(str(e))


def peak_kib(*, reset: bool = False) -> int:
    """The most memory that this process has had since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


async def test_pinned_memory_takes_every_shape_of_transfer(plugged: Plugged, image: Path) -> None:
    fill(image, os.urandom(SIZE_BYTES))
    before = contents(image)
    async with plugged(pinned=True) as (rig, blk):
        for _ in range(2):  # a reset lets go of it, and a start pins it again
            assert await blk.request(IN, 8, read_bytes=8 * KIB) == (OK, before[4096 : 4096 + 8192])
            assert await blk.request(OUT, 64, before[:4096]) == (OK, b"")
            rig.memory.write(DATA_GPA, struct.pack("<IIQ", IN, 0, 1))
            rig.driver.queues[0].offer(
                Segment(DATA_GPA, 16),
                Segment(DATA_GPA + 0x1003, 100, writable=True),
                Segment(DATA_GPA + 0x3001, 413, writable=True),
            )
            rig.driver.kick(0)
            await rig.driver.used(0)
            read = rig.memory.read(DATA_GPA + 0x1003, 100) + rig.memory.read(DATA_GPA + 0x3001, 413)
            assert read == before[512:1024] + bytes([OK])
            await rig.driver.start()
            assert (await blk.request(FLUSH))[0] == OK
    assert contents(image)[64 * 512 : 64 * 512 + 4096] == before[:4096]


async def test_the_driver_switches_the_cache_mode_and_reset_switches_it_back(
    plugged: Plugged,
) -> None:
    async with plugged() as (rig, blk):
        await rig.driver.write(WRITEBACK, 0, size=1)
        assert rig.driver.read(WRITEBACK, 1) == 0
        assert (await blk.request(OUT, 0, b"x" * 512))[0] == OK
        await rig.driver.write(mmio.STATUS, 0)
        assert rig.driver.read(WRITEBACK, 1) == 1


async def test_without_flush_each_write_is_written_through(plugged: Plugged) -> None:
    async with plugged(accept=features.VERSION_1) as (rig, blk):
        assert rig.driver.read(WRITEBACK, 1) == 0
        assert (await blk.request(OUT, 0, b"x" * 512))[0] == OK
        # One batch is the write, another the fdatasync after it.
        assert rig.device.statistics().counters["batches"] == 2


async def test_resize_tells_the_driver(plugged: Plugged, image: Path) -> None:
    async with plugged() as (rig, blk):
        generation = rig.driver.read(mmio.CONFIG_GENERATION)
        os.truncate(image, 2 * SIZE_BYTES)
        assert rig.device.resize() == 2 * SIZE_BYTES
        assert await rig.driver.interrupted() == CONFIG_CHANGE
        assert rig.driver.read(mmio.CONFIG_GENERATION) != generation
        assert rig.driver.read(mmio.CONFIG, 8) == 2 * SIZE_BYTES // 512
        assert (await blk.request(OUT, SIZE_BYTES // 512, b"x" * 512))[0] == OK
        os.truncate(image, 100)
        with pytest.raises(ConfigError, match="100 bytes is not a multiple of 512"):
            rig.device.resize()
        assert rig.driver.read(mmio.CONFIG, 8) == 2 * SIZE_BYTES // 512


async def test_a_reset_leaves_nothing_half_written(plugged: Plugged, image: Path) -> None:
    async with plugged() as (rig, blk):
        data = os.urandom(32 * KIB)
        for i in range(8):
            blk.submit(OUT, 64 * i, data)
        blk.kick()
        await eventually(lambda: rig.device.statistics().queues[0].chains > 0)
        await rig.driver.write(mmio.STATUS, 0)
        before = contents(image)
        rig.memory.write(DATA_GPA, bytes(512 * KIB))  # the driver reuses its memory
        await rig.driver.start()
        assert (await blk.request(FLUSH))[0] == OK
        assert contents(image) == before
        assert before[: len(data)] == data


async def test_at_rest_no_request_is_taken_until_resume(plugged: Plugged) -> None:
    async with plugged() as (rig, blk):
        await rig.device.quiesce()
        await rig.device.quiesce()
        slot = blk.submit(OUT, 0, b"x" * 512)
        blk.kick()
        await settle()
        assert blk.status(slot) == 0xFF
        await rig.device.resume()
        await rig.driver.used(0)
        assert blk.status(slot) == OK


async def test_a_device_held_at_rest_stays_so_when_the_driver_starts_it(plugged: Plugged) -> None:
    async with plugged() as (rig, blk):
        await rig.device.quiesce()
        await rig.driver.start()
        slot = blk.submit(FLUSH)
        blk.kick()
        await settle()
        assert blk.status(slot) == 0xFF
        await rig.device.resume()
        await rig.driver.used(0)
        assert blk.status(slot) == OK


async def test_a_disk_can_be_opened_again_at_once(plugged: Plugged) -> None:
    for _ in range(3):
        async with plugged() as (_, blk):
            assert (await blk.request(OUT, 0, b"x" * 512))[0] == OK


async def test_a_disk_in_use_is_refused(plugged: Plugged) -> None:
    async with plugged():
        with pytest.raises(ConfigError, match="in use by another microVM"):
            async with plugged():
                pass


async def test_a_device_takes_all_its_descriptors_with_it(plugged: Plugged) -> None:
    async with plugged() as (_, blk):
        await blk.request(FLUSH)
    before = set(os.listdir("/proc/self/fd"))
    async with plugged() as (_, blk):
        assert len(os.listdir("/proc/self/fd")) > len(before)
        await blk.request(FLUSH)
    assert set(os.listdir("/proc/self/fd")) == before


async def test_an_error_of_our_own_is_reported_and_the_loop_goes_on(
    plugged: Plugged, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(offset: int, data: bytes) -> None:
        raise ZeroDivisionError("broken")

    async with plugged() as (rig, _):
        monkeypatch.setattr(rig.device, "on_config_write", broken)
        await rig.driver.write(WRITEBACK, 0, size=1)
        assert isinstance(rig.errors[0], BugError)
        assert rig.driver.read(mmio.STATUS) & DEVICE_NEEDS_RESET
        rig.errors.clear()
