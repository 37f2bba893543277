"""The block device (virtio 1.3 section 5.2), on a file and on an object whose calls can be held."""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from avmm.units import KIB, MIB
from avmm.virtio import features
from avmm.virtio.devices.blk import BlkDevice, Disk, build
from avmm.virtio.devices.blk_source import AsyncDisk
from avmm.virtio.devices.blk_source import build as build_source
from avmm.virtio.devtype import DeviceContext
from avmm.virtio.state import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK
from fakes.blk_driver import (
    DISCARD,
    FLUSH,
    IN,
    IOERR,
    OK,
    OUT,
    UNSUPP,
    WRITE_ZEROES,
    BlkDriver,
)
from fakes.mmio_driver import settle

Rigged = Callable[..., Any]
Accepting = Callable[[int], int]
Plugged = Callable[..., AbstractAsyncContextManager[tuple[Any, BlkDriver]]]

SIZE_BYTES = MIB
SECTORS = SIZE_BYTES // 512
PENDING = 0xFF
WRITEBACK, UNUSED0, UNUSED1 = 32, 33, 57
SECURE_ERASE = 14
BLK_LIFETIME = 1 << 15
ZONE_REQUESTS = {
    "append": 15,
    "report": 16,
    "open": 18,
    "close": 20,
    "finish": 22,
    "reset": 24,
    "reset all": 26,
}


def segment(sector: int, sectors: int, flags: int = 0) -> bytes:
    """A struct virtio_blk_discard_write_zeroes."""
    return struct.pack("<QII", sector, sectors, flags)


def contents(image: Path) -> bytes:
    return image.read_bytes()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(4 * KIB) * (SIZE_BYTES // (4 * KIB)))
    return path


@pytest.fixture
def plugged(rigged: Rigged, image: Path) -> Plugged:
    """A disk on `image`; accept: features, all that are offered when None."""

    @asynccontextmanager
    async def plugged(
        accept: int | None = None, **options: object
    ) -> AsyncIterator[tuple[Any, BlkDriver]]:
        disk = Disk(str(image), engine="threads", **options)  # type: ignore[arg-type]

        async def make(context: DeviceContext) -> BlkDevice:
            return await build(disk, context)

        async with rigged(make) as rig:
            await rig.driver.start(accept)
            yield rig, BlkDriver(rig)
            assert rig.errors == []

    return plugged


class HeldDisk:
    """Bytes in memory; flushes wait for their gate. journal: what was done, in order."""

    def __init__(self) -> None:
        self.size = SIZE_BYTES
        self.data = bytearray(SIZE_BYTES)
        self.gate = asyncio.Event()
        self.journal: list[str] = []

    async def read(self, offset: int, size: int) -> bytes:
        return bytes(self.data[offset : offset + size])

    async def write(self, offset: int, data: bytes) -> None:
        self.data[offset : offset + len(data)] = data
        self.journal.append("write")

    async def discard(self, offset: int, size: int) -> None:
        self.data[offset : offset + size] = bytes(size)
        self.journal.append("discard")

    async def flush(self) -> None:
        self.journal.append("flush begins")
        await self.gate.wait()
        self.journal.append("flush ends")


@asynccontextmanager
async def held(
    rigged: Rigged, accept: int | None = None
) -> AsyncIterator[tuple[Any, BlkDriver, HeldDisk]]:
    disk = HeldDisk()
    config = AsyncDisk(disk)
    async with rigged(lambda context: build_source(config, context)) as rig:
        await rig.driver.start(accept)
        yield rig, BlkDriver(rig), disk
        assert rig.errors == []


# --- 5.2.5.2, initialization


@pytest.mark.spec("5.2.5.2", "offer FLUSH if it offers CONFIG_WCE")
@pytest.mark.parametrize("read_only", [False, True])
async def test_who_can_toggle_the_cache_can_flush(plugged: Plugged, read_only: bool) -> None:
    async with plugged(read_only=read_only) as (rig, blk):
        offered = await rig.driver.read_features()
        assert offered & features.BLK_CONFIG_WCE
        assert offered & features.BLK_FLUSH
        assert (await blk.request(FLUSH))[0] == OK


@pytest.mark.spec(
    "5.2.5.2", "begin with writeback at 0 when CONFIG_WCE is negotiated without FLUSH"
)
@pytest.mark.parametrize(
    ("bits", "writeback"),
    [
        (features.BLK_CONFIG_WCE, 0),
        (features.BLK_CONFIG_WCE | features.BLK_FLUSH, 1),
    ],
)
async def test_writeback_is_set_by_the_features(
    rigged: Rigged, accepting: Accepting, image: Path, bits: int, writeback: int
) -> None:
    disk = Disk(str(image), engine="threads")
    async with rigged(lambda context: build(disk, context)) as rig:
        # Twice: what one driver made of it is not what the next one finds.
        for _ in range(2):
            await rig.driver.set_up(accepting(bits))
            assert rig.driver.read_config(WRITEBACK, 1) == writeback
            await rig.driver.write_config(WRITEBACK, 1, 1 - writeback)
            await rig.driver.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
            assert rig.driver.read_config(WRITEBACK, 1) == 1 - writeback


@pytest.mark.spec("5.2.5.2", "keep the padding bytes unused0 and unused1 at 0")
async def test_padding_is_zero_whatever_is_written(plugged: Plugged) -> None:
    async with plugged() as (rig, _):
        for _ in range(2):
            assert rig.driver.read_config(UNUSED0, 1) == 0
            assert [rig.driver.read_config(UNUSED1 + at, 1) for at in range(3)] == [0, 0, 0]
            await rig.driver.write_config(UNUSED0, 1, 0xFF)
            for at in range(3):
                await rig.driver.write_config(UNUSED1 + at, 1, 0xFF)


# --- 5.2.6.2, operation


@pytest.mark.spec("5.2.6.2", "answer a write with IOERR, and write nothing, if it offers RO")
@pytest.mark.parametrize("accepted", [features.BLK_RO, 0], ids=["RO accepted", "RO not accepted"])
async def test_nothing_writes_to_a_read_only_disk(
    plugged: Plugged, accepting: Accepting, image: Path, accepted: int
) -> None:
    before = contents(image)
    async with plugged(accepting(accepted), read_only=True) as (rig, blk):
        assert await rig.driver.read_features() & features.BLK_RO
        for sector in (0, SECTORS - 1):
            assert (await blk.request(OUT, sector, b"x" * 512))[0] == IOERR
        for kind in (DISCARD, WRITE_ZEROES):
            assert (await blk.request(kind, 0, segment(0, 8)))[0] != OK
        assert await blk.request(IN, 0, read_bytes=512) == (OK, before[:512])
    assert contents(image) == before


@pytest.mark.spec(
    "5.2.6.2", "answer UNSUPP to discard, secure erase and write zeroes with an unknown flag"
)
@pytest.mark.parametrize("kind", [DISCARD, SECURE_ERASE, WRITE_ZEROES])
@pytest.mark.parametrize("flags", [0b10, 0b11, 1 << 31])
async def test_unknown_flags_are_unsupported(
    plugged: Plugged, image: Path, kind: int, flags: int
) -> None:
    before = contents(image)
    good, odd, beyond = segment(0, 8), segment(8, 8, flags), segment(SECTORS, 8)
    async with plugged() as (_, blk):
        for data in (odd, good + odd, odd + good, beyond + odd, odd + beyond):
            assert (await blk.request(kind, 0, data))[0] == UNSUPP
    assert contents(image) == before


@pytest.mark.spec("5.2.6.2", "answer UNSUPP to a discard with the flag unmap")
async def test_a_discard_that_unmaps_is_unsupported(plugged: Plugged, image: Path) -> None:
    before = contents(image)
    async with plugged() as (rig, blk):
        assert rig.driver.negotiated & features.BLK_DISCARD
        assert (await blk.request(DISCARD, 0, segment(0, 8, 1)))[0] == UNSUPP
        assert (await blk.request(DISCARD, 0, segment(0, 8) + segment(8, 8, 1)))[0] == UNSUPP
    assert contents(image) == before


@pytest.mark.spec(
    "5.2.6.2", "let reads return zeroes after write zeroes, whether unmap was set or not"
)
@pytest.mark.parametrize("unmap", [0, 1])
async def test_zeroed_sectors_read_as_zeroes(plugged: Plugged, image: Path, unmap: int) -> None:
    before = contents(image)
    ranges = segment(1, 3, unmap) + segment(64, 200, unmap) + segment(SECTORS - 1, 1, unmap)
    expected = bytearray(before)
    for first, count in ((1, 3), (64, 200), (SECTORS - 1, 1)):
        expected[first * 512 : (first + count) * 512] = bytes(count * 512)
    async with plugged() as (_, blk):
        assert (await blk.request(WRITE_ZEROES, 0, ranges))[0] == OK
        found = b""
        for sector in range(0, SECTORS, 64):
            status, data = await blk.request(IN, sector, read_bytes=64 * 512)
            assert status == OK
            found += data
    assert found == expected


@pytest.mark.spec(
    "5.2.6.2",
    "commit a write before it completes, where neither CONFIG_WCE nor FLUSH are negotiated or "
    "writeback is 0",
)
@pytest.mark.parametrize("through", ["no features", "writeback 0", "CONFIG_WCE alone"])
@pytest.mark.parametrize("kind", [OUT, WRITE_ZEROES])
async def test_a_write_that_is_stable_is_committed_first(
    rigged: Rigged, accepting: Accepting, through: str, kind: int
) -> None:
    accept = {
        "no features": accepting(features.BLK_WRITE_ZEROES),
        "writeback 0": None,
        "CONFIG_WCE alone": accepting(features.BLK_CONFIG_WCE | features.BLK_WRITE_ZEROES),
    }
    async with held(rigged, accept[through]) as (rig, blk, disk):
        if through == "writeback 0":
            await rig.driver.write_config(WRITEBACK, 1, 0)
        slot = blk.submit(kind, 0, segment(0, 8, 1) if kind == WRITE_ZEROES else b"x" * 4096)
        blk.kick()
        await settle()
        assert disk.journal[1:] == ["flush begins"]
        assert blk.status(slot) == PENDING
        assert rig.driver.queues[0].take_used() == []
        disk.gate.set()
        await rig.driver.used(0)
        assert blk.status(slot) == OK
        assert disk.journal[2:] == ["flush ends"]


@pytest.mark.spec("5.2.6.2", "commit all completed writes before a flush completes")
async def test_a_flush_completes_after_the_commit(rigged: Rigged) -> None:
    async with held(rigged) as (rig, blk, disk):
        assert (await blk.request(OUT, 0, b"x" * 512))[0] == OK
        assert disk.journal == ["write"]  # the cache is in write-back mode
        slot = blk.submit(FLUSH)
        blk.kick()
        await settle()
        assert disk.journal == ["write", "flush begins"]
        assert blk.status(slot) == PENDING
        disk.gate.set()
        await rig.driver.used(0)
        assert blk.status(slot) == OK
        assert disk.journal[-1] == "flush ends"


@pytest.mark.spec("5.2.6.2", "not offer LIFETIME for storage that has no such metrics")
async def test_a_file_has_no_lifetime(plugged: Plugged) -> None:
    async with plugged() as (rig, blk):
        assert not await rig.driver.read_features() & BLK_LIFETIME
        assert (await blk.request(10, read_bytes=6))[0] == UNSUPP


@pytest.mark.spec("5.2.6.2", "reject zone requests with UNSUPP when ZONED is not negotiated")
@pytest.mark.parametrize("kind", ZONE_REQUESTS.values(), ids=ZONE_REQUESTS)
async def test_zone_requests_are_unsupported(plugged: Plugged, image: Path, kind: int) -> None:
    before = contents(image)
    async with plugged() as (_, blk):
        assert (await blk.request(kind))[0] == UNSUPP
        assert (await blk.request(kind, 0, b"x" * 512))[0] == UNSUPP
        assert (await blk.request(kind, 0, read_bytes=512))[0] == UNSUPP
    assert contents(image) == before
