"""virtio-blk on Python objects: real rings, the real parser, an object in the place of a file."""

from __future__ import annotations

import asyncio
import os
import random
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from avmm.block.objects import FaultRates, FaultyDisk, RamDisk
from avmm.errors import ConfigError
from avmm.units import KIB, MIB
from avmm.virtio import features, workers
from avmm.virtio.devices.blk_source import AsyncDisk, SourceBlkDevice, build
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
PENDING = 0xFF


class PlainDisk:
    """The least that a disk can be, and what was asked of it."""

    def __init__(self) -> None:
        self.size = SIZE_BYTES
        self.data = bytearray(SIZE_BYTES)
        self.calls: list[tuple[Any, ...]] = []

    async def read(self, offset: int, size: int) -> bytes:
        self.calls.append(("read", offset, size))
        return bytes(self.data[offset : offset + size])

    async def write(self, offset: int, data: bytes) -> None:
        self.calls.append(("write", offset, len(data)))
        assert type(data) is bytes
        self.data[offset : offset + len(data)] = data


class DurableDisk(PlainDisk):
    """With everything optional."""

    async def flush(self) -> None:
        self.calls.append(("flush",))

    async def discard(self, offset: int, size: int) -> None:
        self.calls.append(("discard", offset, size))
        self.data[offset : offset + size] = bytes(size)


class SlowDisk(DurableDisk):
    """Each call waits for its gate, which stands at its offset, if there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.gates: dict[int, asyncio.Event] = {}
        self.cancelled: list[int] = []

    def gate(self, *offsets: int) -> None:
        for offset in offsets:
            self.gates[offset] = asyncio.Event()

    async def _wait(self, offset: int) -> None:
        if (gate := self.gates.get(offset)) is not None:
            try:
                await gate.wait()
            except asyncio.CancelledError:
                self.cancelled.append(offset)
                raise

    async def read(self, offset: int, size: int) -> bytes:
        await self._wait(offset)
        return await super().read(offset, size)

    async def write(self, offset: int, data: bytes) -> None:
        await self._wait(offset)
        await super().write(offset, data)


class RaisingDisk(DurableDisk):
    """Every call raises what it is told."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    async def read(self, offset: int, size: int) -> bytes:
        raise self.error

    async def write(self, offset: int, data: bytes) -> None:
        raise self.error

    async def flush(self) -> None:
        raise self.error

    async def discard(self, offset: int, size: int) -> None:
        raise self.error


@asynccontextmanager
async def plugged(
    source: object, accept: int | None = None, **options: object
) -> AsyncIterator[tuple[Rig[SourceBlkDevice], BlkDriver]]:
    disk = AsyncDisk(source, **options)  # type: ignore[arg-type]
    async with virtio_rig(lambda context: build(disk, context), io_threads=1) as rig:
        await rig.driver.start(accept)
        yield rig, BlkDriver(rig)
        assert rig.errors == []


async def test_what_is_written_is_read_back_and_is_in_the_object() -> None:
    source, data = DurableDisk(), os.urandom(12 * KIB)
    async with plugged(source) as (rig, blk):
        assert await blk.request(OUT, 8, data) == (OK, b"")
        assert await blk.request(FLUSH) == (OK, b"")
        assert await blk.request(IN, 8, read_bytes=len(data)) == (OK, data)
        counters = rig.device.statistics().counters
        assert (counters["writes"], counters["reads"], counters["flushes"]) == (1, 1, 1)
        assert counters["failed"] == counters["errors"] == 0
    assert source.data[4 * KIB : 16 * KIB] == data
    size = len(data)
    assert source.calls == [("write", 4096, size), ("flush",), ("read", 4096, size)]


@pytest.mark.parametrize("make", [PlainDisk, lambda: RamDisk(SIZE_BYTES)], ids=["bytes", "views"])
async def test_data_may_be_cut_into_any_segments(make: Any) -> None:
    source = make()
    data = os.urandom(2048)
    cuts = ((0, 100), (100, 1), (101, 900), (1001, 1047))
    async with plugged(source) as (rig, _):
        memory, queue = rig.memory, rig.driver.queues[0]
        memory.write(DATA_GPA, struct.pack("<IIQ", OUT, 0, 3))
        memory.write(DATA_GPA + 0x1000, data)
        status = Segment(DATA_GPA + 0x100, 1, writable=True)
        queue.offer(
            Segment(DATA_GPA, 16), *(Segment(DATA_GPA + 0x1000 + at, n) for at, n in cuts), status
        )
        rig.driver.kick(0)
        await rig.driver.used(0)
        memory.write(DATA_GPA, struct.pack("<IIQ", IN, 0, 3))
        memory.write(DATA_GPA + 0x1000, bytes(len(data)))
        queue.offer(
            Segment(DATA_GPA, 16),
            *(Segment(DATA_GPA + 0x1000 + at, n, writable=True) for at, n in cuts),
            status,
        )
        rig.driver.kick(0)
        ((_, written),) = await rig.driver.used(0)
        assert written == len(data) + 1
        assert memory.read(DATA_GPA + 0x1000, len(data)) == data
        assert memory.read(DATA_GPA + 0x100, 1) == bytes([OK])


async def test_a_full_queue_is_performed_at_once_and_ends_in_any_order() -> None:
    source = SlowDisk()
    source.gate(*(4096 * i for i in range(16)))
    async with plugged(source) as (rig, blk):
        slots = [blk.submit(OUT, 8 * i, bytes([i + 1]) * 512) for i in range(16)]
        blk.kick()
        for i in (7, 15, 0, 3):
            source.gates[4096 * i].set()
            await rig.driver.used(0)
            assert blk.status(slots[i]) == OK
        left = [i for i in range(16) if i not in (7, 15, 0, 3)]
        assert {blk.status(slots[i]) for i in left} == {PENDING}
        for gate in source.gates.values():
            gate.set()
        await rig.driver.used(0, len(left))
        assert {blk.status(slot) for slot in slots} == {OK}
    assert [source.data[4096 * i] for i in range(16)] == [i + 1 for i in range(16)]


async def test_a_call_that_hangs_holds_up_only_its_own_request() -> None:
    source = SlowDisk()
    source.gate(0)
    async with plugged(source) as (_, blk):
        stuck = blk.submit(IN, 0, read_bytes=512)
        for turn in range(30):
            assert await blk.request(OUT, 8, bytes([turn]) * 512) == (OK, b"")
        assert blk.status(stuck) == PENDING
    assert source.cancelled == [0]


@pytest.mark.parametrize("error", [OSError(5, "worn out"), ValueError("a bug"), KeyError(1)])
async def test_what_a_call_raises_is_an_io_error_and_in_the_log(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async with plugged(RaisingDisk(error)) as (rig, blk):
        assert await blk.request(IN, 8, read_bytes=512) == (IOERR, bytes(512))
        assert await blk.request(OUT, 8, bytes(512)) == (IOERR, b"")
        assert await blk.request(FLUSH) == (IOERR, b"")
        counters = rig.device.statistics().counters
        assert (counters["failed"], counters["errors"]) == (3, 3)
        assert rig.device.state.driver_ok
    assert "test0: read of 512 bytes at 4096: RaisingDisk: " in caplog.text
    assert str(error) in caplog.text


async def test_what_is_not_implemented_is_unsupported() -> None:
    ranges = struct.pack("<QII", 8, 8, 0)
    async with plugged(RaisingDisk(NotImplementedError())) as (rig, blk):
        assert (await blk.request(IN, 8, read_bytes=512))[0] == UNSUPP
        assert (await blk.request(OUT, 8, bytes(512)))[0] == UNSUPP
        assert (await blk.request(FLUSH))[0] == UNSUPP
        assert (await blk.request(DISCARD, 0, ranges))[0] == OK, "a hint"
        assert rig.device.statistics().counters["unsupported"] == 3


async def test_a_read_of_the_wrong_length_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    source = PlainDisk()
    source.data = bytearray(100)
    async with plugged(source) as (_, blk):
        assert await blk.request(IN, 0, read_bytes=512) == (IOERR, bytes(512))
    assert "it returned 100 bytes" in caplog.text


async def test_a_request_beyond_the_end_never_reaches_the_object() -> None:
    source = DurableDisk()
    async with plugged(source) as (_, blk):
        assert (await blk.request(IN, SIZE_BYTES // 512, read_bytes=512))[0] == IOERR
        assert (await blk.request(OUT, SIZE_BYTES // 512 - 1, bytes(1024)))[0] == IOERR
        assert (await blk.request(99))[0] == UNSUPP
    assert source.calls == []


def offer_again_and_again(
    rig: Rig[SourceBlkDevice], kind: int, sizes: Sequence[int], at: int = DATA_GPA + 0x1000
) -> None:
    """A request from sector 0 on, whose segments all begin at the same byte; it is kicked."""
    rig.memory.write(DATA_GPA, struct.pack("<IIQ", kind, 0, 0))
    rig.driver.queues[0].offer(
        Segment(DATA_GPA, 16),
        *(Segment(at, size, writable=kind == IN) for size in sizes),
        Segment(DATA_GPA + 0x100, 1, writable=True),
    )
    rig.driver.kick(0)


class LargeDisk(PlainDisk):
    def __init__(self) -> None:
        super().__init__()
        self.size = 8 * MIB
        self.data = bytearray(self.size)


class LargeViews(LargeDisk):
    """The same by views."""

    async def read_into(self, offset: int, views: Sequence[memoryview]) -> None:
        at = offset
        for view in views:
            view[:] = self.data[at : at + len(view)]
            at += len(view)
        self.calls.append(("read", offset, at - offset))

    async def write_from(self, offset: int, views: Sequence[memoryview]) -> None:
        await self.write(offset, b"".join(views))


@pytest.mark.parametrize("make", [LargeDisk, LargeViews])
async def test_a_request_larger_than_may_be_copied_is_done_in_pieces(make: Any) -> None:
    source, data = make(), os.urandom(MIB)
    cuts = [MIB - 512, 1000, 2 * MIB - 488, *[MIB] * 2]
    async with plugged(source) as (rig, _):
        rig.memory.write(DATA_GPA + 0x1000, data * 2)
        offer_again_and_again(rig, OUT, cuts)
        await rig.driver.used(0)
        assert rig.memory.read(DATA_GPA + 0x100, 1) == bytes([OK])
        expected = b"".join((data * 2)[:size] for size in cuts)
        assert source.data[: len(expected)] == expected
        assert [call[2] for call in source.calls] == [4 * MIB, MIB]
        source.calls.clear()
        source.data[3 * MIB : 6 * MIB] = os.urandom(3 * MIB)
        cuts = [2 * MIB + 100, 2 * MIB + 412]
        offer_again_and_again(rig, IN, cuts)
        ((_, written),) = await rig.driver.used(0)
        assert (rig.memory.read(DATA_GPA + 0x100, 1), written) == (bytes([OK]), sum(cuts) + 1)
        assert source.calls == [("read", 0, 4 * MIB), ("read", 4 * MIB, 512)]
        begin = cuts[0]
        assert rig.memory.read(DATA_GPA + 0x1000, cuts[1]) == source.data[begin : begin + cuts[1]]


async def test_what_is_copied_at_a_time_is_bounded_for_all_requests_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("avmm.virtio.devices.blk._COPY_MAX_BYTES", 8 * MIB)
    gate = asyncio.Event()

    class Waiting(LargeDisk):
        under_way = most = 0

        async def write(self, offset: int, data: bytes) -> None:
            self.under_way += len(data)
            self.most = max(self.most, self.under_way)
            await gate.wait()
            self.under_way -= len(data)

    source = Waiting()
    async with plugged(source) as (rig, blk):
        for _ in range(4):
            offer_again_and_again(rig, OUT, [MIB] * 7)
        await eventually(lambda: source.under_way == 8 * MIB)
        await settle()
        gate.set()
        await rig.driver.used(0, 4)
        assert source.most == 8 * MIB
        assert rig.device.statistics().counters["write_bytes"] == 28 * MIB
        assert await blk.request(OUT, 0, bytes(512)) == (OK, b"")


async def test_trim_and_zeroes_reach_an_object_that_has_discard() -> None:
    source = DurableDisk()
    source.data[:] = b"x" * SIZE_BYTES
    async with plugged(source) as (_, blk):
        ranges = struct.pack("<QIIQII", 8, 8, 0, 64, 16, 0)
        assert await blk.request(DISCARD, 0, ranges) == (OK, b"")
        assert await blk.request(WRITE_ZEROES, 0, struct.pack("<QII", 128, 8, 1)) == (OK, b"")
    places = [(4096, 4096), (32768, 8192), (65536, 4096)]
    assert source.calls == [("discard", *place) for place in places]


async def test_zeroes_are_written_where_there_is_no_discard() -> None:
    source = PlainDisk()
    source.data[:] = b"x" * SIZE_BYTES
    async with plugged(source) as (rig, blk):
        assert not await rig.driver.read_features() & features.BLK_DISCARD
        assert (await blk.request(DISCARD, 0, struct.pack("<QII", 8, 8, 0)))[0] == UNSUPP
        for flags in (0, 1):
            zeroes = struct.pack("<QII", 8 + 1000 * flags, 300, flags)
            assert await blk.request(WRITE_ZEROES, 0, zeroes) == (OK, b"")
    assert not any(source.data[4096 : 4096 + 300 * 512])
    assert source.data[4095] == source.data[4096 + 300 * 512] == ord("x")
    assert [call for call in source.calls if call[0] != "write"] == []


async def test_without_flush_the_guests_flush_succeeds() -> None:
    async with plugged(PlainDisk()) as (_, blk):
        assert await blk.request(FLUSH) == (OK, b"")


async def test_each_write_is_flushed_for_a_driver_that_cannot_flush() -> None:
    source = DurableDisk()
    async with plugged(source, features.VERSION_1) as (_, blk):
        assert await blk.request(OUT, 0, bytes(512)) == (OK, b"")
    assert [call[0] for call in source.calls] == ["write", "flush"]


async def test_a_read_only_disk_refuses_to_be_written() -> None:
    source = DurableDisk()
    async with plugged(source, read_only=True, serial="a-serial") as (rig, blk):
        assert await rig.driver.read_features() & features.BLK_RO
        assert (await blk.request(OUT, 0, bytes(512)))[0] == IOERR
        assert await blk.request(GET_ID, read_bytes=20) == (OK, b"a-serial".ljust(20, b"\0"))
    assert source.calls == []


async def test_reset_cancels_and_is_complete_before_memory_is_used_again() -> None:
    source = SlowDisk()
    source.gate(0, 4096)
    async with plugged(source) as (rig, blk):
        blk.submit(IN, 0, read_bytes=512)
        blk.submit(OUT, 8, bytes(512))
        blk.kick()
        await eventually(lambda: rig.device._feed._workers.in_flight == 2)
        await settle()
        await rig.driver.set_status(0)
        assert sorted(source.cancelled) == [0, 4096]
        assert source.calls == []
        rig.memory.write(DATA_GPA, bytes(0x30000))
        source.gates.clear()
        await rig.driver.start()
        assert rig.memory.read(DATA_GPA, 0x30000) == bytes(0x30000)
        assert await BlkDriver(rig).request(OUT, 8, b"x" * 512) == (OK, b"")


async def test_resets_at_any_moment_leave_nothing_in_flight() -> None:
    choice = random.Random(11)
    rates = FaultRates(read_error=0.1, write_error=0.1, torn_write=0.1, delay=0.5, delay_s=0.001)
    async with plugged(FaultyDisk(RamDisk(SIZE_BYTES), rates, seed=11)) as (rig, _):
        for _ in range(12):
            blk = BlkDriver(rig)
            for _ in range(choice.randrange(1, 16)):
                kind = choice.choice((IN, OUT, FLUSH))
                data = bytes(4096) if kind == OUT else b""
                blk.submit(kind, 8, data, read_bytes=4096 if kind == IN else 0)
                if choice.random() < 0.7:
                    blk.kick()
                if choice.random() < 0.3:
                    await asyncio.sleep(0)
            for _ in range(choice.randrange(8)):
                await asyncio.sleep(0)
            await rig.driver.set_status(0)
            assert rig.device._feed._workers.in_flight == 0
            rig.memory.write(DATA_GPA, bytes(16 * 0x10000))
            await rig.driver.start()
            assert not any(rig.memory.read(DATA_GPA, 16 * 0x10000))
        source = rig.device.disk.source
        source.rates = FaultRates()
        assert await BlkDriver(rig).request(OUT, 8, b"e" * 512) == (OK, b"")


async def test_reset_ends_requests_of_many_operations_too() -> None:
    class Zeroes(PlainDisk):
        async def write(self, offset: int, data: bytes) -> None:
            await asyncio.sleep(0)

    async with plugged(Zeroes()) as (rig, blk):
        blk.submit(WRITE_ZEROES, 0, struct.pack("<QII", 0, SIZE_BYTES // 512, 0))
        blk.kick()
        await eventually(lambda: rig.device._feed._workers.in_flight == 1)
        await rig.driver.set_status(0)
        assert rig.device._feed._workers.in_flight == 0


async def test_quiesce_waits_for_what_is_in_flight() -> None:
    source = SlowDisk()
    source.gate(0)
    async with plugged(source) as (rig, blk):
        slot = blk.submit(OUT, 0, b"q" * 512)
        blk.kick()
        await eventually(lambda: rig.device._feed._workers.in_flight == 1)
        quiescing = asyncio.create_task(rig.device.quiesce())
        await settle()
        assert not quiescing.done()
        source.gates[0].set()
        await quiescing
        assert blk.status(slot) == OK
        late = blk.submit(IN, 0, read_bytes=512)
        blk.kick()
        await settle()
        assert blk.status(late) == PENDING
        await rig.device.resume()
        await rig.driver.used(0, 2)
        assert blk.status(late) == OK


async def test_the_end_is_not_held_up_by_somebody_who_waits_for_rest() -> None:
    source = SlowDisk()
    source.gate(0)
    async with plugged(source) as (rig, blk):
        blk.submit(OUT, 0, b"q" * 512)
        blk.kick()
        await eventually(lambda: rig.device._feed._workers.in_flight == 1)
        quiescing = asyncio.create_task(rig.device.quiesce())
        await settle()
        await rig.device.end()
        await quiescing
    assert source.cancelled == [0]


async def test_a_coroutine_that_will_not_end_is_given_up_and_touches_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers.Workers.cancel, "__kwdefaults__", {"timeout_s": 0.01})
    release, asked = asyncio.Event(), asyncio.Event()

    class Stubborn(PlainDisk):
        async def read(self, offset: int, size: int) -> bytes:
            asked.set()
            while not release.is_set():
                try:
                    await release.wait()
                except asyncio.CancelledError:
                    continue
            return b"y" * size

    async with plugged(Stubborn()) as (rig, blk):
        blk.submit(IN, 0, read_bytes=512)
        blk.kick()
        await asked.wait()
        await rig.driver.set_status(0)
        assert "goes on after it was cancelled" in caplog.text
        rig.memory.write(DATA_GPA, bytes(0x2000))
        (task,) = rig.device._feed._workers._abandoned
        release.set()
        await task
        assert rig.memory.read(DATA_GPA, 0x2000) == bytes(0x2000)
        await rig.driver.start()
        assert await BlkDriver(rig).request(OUT, 0, bytes(512)) == (OK, b"")


async def test_views_are_of_no_use_after_the_call() -> None:
    class Keeper(RamDisk):
        kept: Sequence[memoryview] = ()

        async def read_into(self, offset: int, views: Sequence[memoryview]) -> None:
            self.kept = list(views)
            await super().read_into(offset, views)

        async def write_from(self, offset: int, views: Sequence[memoryview]) -> None:
            assert all(view.readonly for view in views)
            await super().write_from(offset, views)

    source = Keeper(SIZE_BYTES)
    async with plugged(source) as (_, blk):
        assert await blk.request(OUT, 0, b"v" * 512) == (OK, b"")
        assert await blk.request(IN, 0, read_bytes=512) == (OK, b"v" * 512)
        with pytest.raises(ValueError, match="released"):
            bytes(source.kept[0])


async def test_the_size_is_taken_over_when_the_object_has_grown() -> None:
    source = PlainDisk()
    async with plugged(source) as (rig, blk):
        source.data = bytearray(2 * SIZE_BYTES)
        source.size = 2 * SIZE_BYTES
        assert rig.device.resize() == 2 * SIZE_BYTES
        assert await blk.request(OUT, SIZE_BYTES // 512, b"g" * 512) == (OK, b"")
        source.size = 1
        with pytest.raises(ConfigError, match="size 1 is not a positive multiple of 512"):
            rig.device.resize()


class Sync(PlainDisk):
    def flush(self) -> None:
        """Not a coroutine."""


class Unreadable:
    size = 512


class Unsized:
    async def read(self, offset: int, size: int) -> bytes:
        return b""


class OddArguments(PlainDisk):
    async def write(self, data: bytes) -> None:  # type: ignore[override]
        """One argument is missing."""


class ReadOnly(Unsized):
    size = 512


def sized(size: object) -> object:
    disk = PlainDisk()
    disk.size = size  # type: ignore[assignment]
    return disk


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (PlainDisk, "an object is needed, not the class PlainDisk"),
        ("disk.img", "AsyncDisk str: it has no size"),
        (Unsized(), "AsyncDisk Unsized: it has no size"),
        (Unreadable(), r"it has no async read\(offset, size\)"),
        (ReadOnly(), "attach it with read_only=True"),
        (Sync(), r"flush\(\) has to be a coroutine function"),
        (OddArguments(), r"write\(offset, data\) cannot be called so"),
        (sized(1000), "size 1000 is not a positive multiple of 512"),
        (sized(0), "size 0 is not"),
        (sized("1M"), "size is '1M', not a number of bytes"),
    ],
)
def test_what_cannot_be_a_disk_is_refused_by_name(source: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        AsyncDisk(source)
    assert caught.value.kind == "disk"


def test_a_disk_that_is_only_read_needs_no_write() -> None:
    assert AsyncDisk(ReadOnly(), read_only=True).source
    with pytest.raises(ConfigError, match="queue_size=7"):
        AsyncDisk(PlainDisk(), queue_size=7)
    with pytest.raises(ConfigError, match="serial"):
        AsyncDisk(PlainDisk(), serial="x" * 21)
