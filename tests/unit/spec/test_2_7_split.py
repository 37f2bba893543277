"""Split virtqueues (virtio 1.3 section 2.7): the native ring, and devices on it.

What any ring does with what a driver writes is in tests/unit/virtio_ring.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from avmm.units import KIB
from avmm.virtio import features
from avmm.virtio.device import VirtioDevice
from avmm.virtio.devices.blk_source import AsyncDisk
from avmm.virtio.devices.blk_source import build as build_source
from avmm.virtio.devices.rng import Rng, build
from avmm.virtio.devtype import DeviceContext
from fakes.blk_driver import IN, OK, OUT
from fakes.driver_queue import INDIRECT, NEXT, WRITE, Segment
from fakes.every_device import RamDisk
from fakes.mmio_driver import settle
from fakes.native_ring import DATA_GPA, TABLE_GPA, NativeRing, native_ring
from fakes.ring import OracleChain

Rigged = Callable[..., Any]

EVENT_IDX = features.RING_EVENT_IDX
SIZE = 16


@pytest.fixture(params=[0, EVENT_IDX], ids=["flags", "event_idx"])
def native(request: pytest.FixtureRequest) -> Iterator[NativeRing]:
    with native_ring(SIZE, request.param) as native:
        yield native


def used_flags(native: NativeRing) -> int:
    return int.from_bytes(native.memory.read(native.driver.device_gpa, 2), "little")


def used_idx(native: NativeRing) -> int:
    return int.from_bytes(native.memory.read(native.driver.device_gpa + 2, 2), "little")


def used_element(native: NativeRing, index: int) -> tuple[int, ...]:
    """id and length."""
    return struct.unpack("<II", native.memory.read(native.driver.device_gpa + 4 + 8 * index, 8))


def set_avail_flags(native: NativeRing, flags: int) -> None:
    native.memory.write(native.driver.driver_gpa, struct.pack("<H", flags))


def set_used_event(native: NativeRing, index: int) -> None:
    native.memory.write(native.driver.driver_gpa + 4 + 2 * SIZE, struct.pack("<H", index))


def use_one(native: NativeRing) -> bool:
    """A buffer is offered and used; whether the driver was notified."""
    native.driver.offer(Segment(DATA_GPA, 8, writable=True))
    native.use(8)
    notified = native.interrupted()
    return notified


@pytest.mark.spec("2.7.5.3.2", "ignore the write flag of a descriptor that names an indirect table")
@pytest.mark.parametrize("flags", [0, WRITE])
def test_the_write_flag_of_an_indirect_descriptor_means_nothing(
    native: NativeRing, flags: int
) -> None:
    entries = [(DATA_GPA, 16, NEXT, 1), (DATA_GPA + 64, 32, WRITE, 0)]
    native.memory.write(TABLE_GPA, b"".join(struct.pack("<QIHH", *entry) for entry in entries))
    native.driver.write_desc(3, TABLE_GPA, 32, INDIRECT | flags, 0)
    native.driver.offer_head(3)
    assert native.take() == OracleChain(3, ((DATA_GPA, 16),), ((DATA_GPA + 64, 32),))


@pytest.mark.spec("2.7.5.3.2", "take a chain of which a table is the last element")
@pytest.mark.parametrize("before", range(4))
def test_a_chain_may_go_on_in_a_table(native: NativeRing, before: int) -> None:
    for at in range(before):
        native.driver.write_desc(at, DATA_GPA + 256 * at, 8, NEXT, at + 1)
    entries = [(DATA_GPA + 0x2000, 16, NEXT, 1), (DATA_GPA + 0x3000, 32, WRITE, 0)]
    native.memory.write(TABLE_GPA, b"".join(struct.pack("<QIHH", *entry) for entry in entries))
    native.driver.write_desc(before, TABLE_GPA, 32, INDIRECT, 0)
    native.driver.offer_head(0)
    readable = [(DATA_GPA + 256 * at, 8) for at in range(before)] + [(DATA_GPA + 0x2000, 16)]
    assert native.take() == OracleChain(0, tuple(readable), ((DATA_GPA + 0x3000, 32),))


@pytest.mark.spec("2.7.7.2", "without EVENT_IDX ignore used_event")
@pytest.mark.spec("2.7.7.2", "without EVENT_IDX notify of a used buffer when flags is 0")
@pytest.mark.parametrize("event", [0, 1, 5, 0xFFFF])
def test_without_event_idx_the_flags_alone_decide(event: int) -> None:
    with native_ring(SIZE, 0) as native:
        for index in range(4):
            set_used_event(native, event)
            set_avail_flags(native, 0)
            assert use_one(native), index
            set_avail_flags(native, 1)
            assert not use_one(native), index


@pytest.mark.spec("2.7.7.2", "with EVENT_IDX ignore the lowest bit of flags")
@pytest.mark.spec("2.7.7.2", "with EVENT_IDX notify of the used element that used_event names")
@pytest.mark.parametrize("flags", [0, 1])
def test_with_event_idx_the_named_element_decides(flags: int) -> None:
    with native_ring(SIZE, EVENT_IDX) as native:
        set_avail_flags(native, flags)
        for named in (0, 3, 4, 9):
            set_used_event(native, named)
            while used_idx(native) < named:
                assert not use_one(native)
            assert use_one(native)
            assert used_idx(native) == named + 1


@pytest.mark.spec("2.7.7.2", "with EVENT_IDX notify of the used element that used_event names")
def test_an_element_in_the_middle_of_a_batch_is_notified_of() -> None:
    with native_ring(SIZE, EVENT_IDX) as native:
        for named, expected in ((1, True), (3, True), (8, True), (8, False), (12, True)):
            set_used_event(native, named)
            for _ in range(3):
                native.driver.offer(Segment(DATA_GPA, 8))
                native.push(native.take().head, 0)
            assert native.flush() is expected, named


@pytest.mark.spec("2.7.8.2", "set an element's length before the index that shows it")
@pytest.mark.spec("2.7.8.2", "write as many bytes as it says before the index that shows it")
def test_lengths_are_there_before_the_index(native: NativeRing) -> None:
    heads = [native.driver.offer(Segment(DATA_GPA, 64, writable=True)) for _ in range(3)]
    for index, written in enumerate((5, 0, 64)):
        native.push(native.take().head, written)
        assert used_element(native, index) == (heads[index], written)
        assert used_idx(native) == 0
    native.flush()
    assert used_idx(native) == 3


@pytest.mark.spec("2.7.10.2", "without EVENT_IDX set flags to 0 or 1")
def test_flags_ask_for_kicks_or_not() -> None:
    with native_ring(SIZE, 0) as native:
        for _ in range(3):
            native.kicks_off()
            assert used_flags(native) == 1
            native.kicks_on()
            assert used_flags(native) == 0


@pytest.mark.spec("2.7.10.2", "with EVENT_IDX set flags to 0")
def test_with_event_idx_flags_stay_0() -> None:
    with native_ring(SIZE, EVENT_IDX) as native:
        for _ in range(3):
            for step in (native.kicks_off, native.kicks_on):
                step()
                assert used_flags(native) == 0
            use_one(native)


@pytest.mark.parametrize("layout", ["split"], indirect=True)
@pytest.mark.parametrize("event_idx", [0, EVENT_IDX])
@pytest.mark.spec("2.7.10.2", "without EVENT_IDX set flags to 0 or 1")
@pytest.mark.spec("2.7.10.2", "with EVENT_IDX set flags to 0")
async def test_a_device_at_work_writes_only_such_flags(rigged: Rigged, event_idx: int) -> None:
    async with rigged(lambda context: build(Rng(), context)) as rig:
        await rig.driver.start(features.VERSION_1 | event_idx, size=4)
        queue = rig.driver.queues[0]
        for _ in range(40):
            queue.offer(Segment(DATA_GPA, 16, writable=True))
            rig.driver.kick(0)
            await rig.driver.used(0)
            flags = int.from_bytes(rig.memory.read(queue.device_gpa, 2), "little")
            assert flags in ((0,) if event_idx else (0, 1))


@pytest.mark.parametrize("layout", ["split"], indirect=True)
@pytest.mark.spec("2.7.10.2", "bear notifications that announce nothing")
async def test_notifications_of_nothing_change_nothing(rigged: Rigged) -> None:
    async with rigged(lambda context: build(Rng(), context)) as rig:
        await rig.driver.start()
        queue = rig.driver.queues[0]
        for _ in range(3):
            for _ in range(20):
                rig.driver.kick(0)
                await settle()
            assert queue.take_used() == []
            assert await rig.driver.take_interrupts() == 0
            head = queue.offer(Segment(DATA_GPA, 16, writable=True))
            for _ in range(5):
                rig.driver.kick(0)
            assert await rig.driver.used(0) == [(head, 16)]
        assert rig.device.statistics().faults == 0


async def build_disk(context: DeviceContext) -> VirtioDevice:
    return await build_source(AsyncDisk(RamDisk()), context)


@pytest.mark.spec("2.7.5.1", "not write to buffers that are for it to read")
@pytest.mark.spec("2.8.15", "not write to buffers that are for it to read")
@pytest.mark.spec("2.7.4.1", "assume nothing of how a request is cut into descriptors")
@pytest.mark.parametrize("table", [False, True], ids=["chain", "table"])
@pytest.mark.parametrize("cuts", [(), (1,), (8, 15), (16,), (17, 300), (3, 16, 528)])
async def test_a_request_is_understood_however_it_is_cut(
    rigged: Rigged, cuts: tuple[int, ...], table: bool
) -> None:
    data = bytes(range(256)) * 2
    async with rigged(build_disk) as rig:
        await rig.driver.start()
        queue = rig.driver.queues[0]

        async def request(readable: bytes, writable: int) -> bytes:
            at = DATA_GPA + 4 * KIB
            rig.memory.write(DATA_GPA, readable.ljust(4 * KIB, b"\0"))
            segments = pieces(DATA_GPA, len(readable), cuts, writable=False)
            segments += pieces(at, writable, cuts, writable=True)
            if table:
                queue.offer_indirect(TABLE_GPA, *segments)
            else:
                queue.offer(*segments)
            rig.driver.kick(0)
            ((_, written),) = await rig.driver.used(0)
            assert written == writable
            assert rig.memory.read(DATA_GPA, 4 * KIB) == readable.ljust(4 * KIB, b"\0")
            answer: bytes = rig.memory.read(at, writable)
            return answer

        assert await request(struct.pack("<IIQ", OUT, 0, 9) + data, 1) == bytes([OK])
        assert await request(struct.pack("<IIQ", IN, 0, 9), 513) == data + bytes([OK])


def pieces(gpa: int, size: int, cuts: tuple[int, ...], *, writable: bool) -> list[Segment]:
    """The range in segments that end at the cuts within it."""
    ends = [0, *(cut for cut in cuts if cut < size), size]
    return [Segment(gpa + a, b - a, writable) for a, b in itertools.pairwise(ends)]
