"""native/vring_packed.c against the oracle, and against drivers that break the rules (virtio 1.3,
2.8)."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

import pytest

from avmm.units import MIB
from avmm.virtio import features
from fakes.driver_queue import (
    AVAIL,
    EVENT_DESC,
    EVENT_DISABLE,
    EVENT_ENABLE,
    INDIRECT,
    NEXT,
    USED,
    WRITE,
    PackedDriverQueue,
    Segment,
)
from fakes.native_ring import (
    DATA_GPA,
    RING_GPA,
    TABLE_GPA,
    NativeRing,
    native_ring,
    play_garbage,
    play_histories,
)
from fakes.packed_ring import PackedOracleRing
from fakes.ring import OracleChain

PACKED = features.RING_PACKED
EVENT_IDX = features.RING_EVENT_IDX
WRAP = 1 << 15


@pytest.fixture
def native(request: pytest.FixtureRequest) -> Iterator[NativeRing]:
    with native_ring(getattr(request, "param", 16), PACKED) as native:
        yield native


def queue_of(native: NativeRing) -> PackedDriverQueue:
    assert isinstance(native.driver, PackedDriverQueue)
    return native.driver


def descriptor(native: NativeRing, index: int) -> tuple[int, ...]:
    """gpa, length, id, flags."""
    return struct.unpack("<QIHH", native.memory.read(RING_GPA + 16 * index, 16))


def device_event(native: NativeRing) -> tuple[int, ...]:
    """Offset and wrap counter, flags."""
    return struct.unpack("<HH", native.memory.read(native.driver.device_gpa, 4))


def spin(native: NativeRing, count: int) -> None:
    """Let `count` descriptors go round, one after the other."""
    for _ in range(count):
        native.driver.offer(Segment(DATA_GPA, 8))
        native.use()
        native.driver.take_used()
    native.interrupted()


@pytest.mark.parametrize("in_order", [0, features.IN_ORDER])
@pytest.mark.parametrize("event_idx", [0, EVENT_IDX])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 255, 256])
@pytest.mark.spec("2.8.12", "take up descriptors in the order of the ring")
@pytest.mark.spec("2.8.18", "use a chain's descriptors in the order in which they became available")
def test_random_histories_equal_the_oracles(size: int, event_idx: int, in_order: int) -> None:
    play_histories(PackedOracleRing, size, PACKED | event_idx | in_order, seeds=6, steps=250)


@pytest.mark.parametrize("event_idx", [0, EVENT_IDX])
def test_whatever_a_driver_writes_stays_in_memory(event_idx: int) -> None:
    faults = play_garbage(7, PACKED | event_idx, seeds=20, steps=200)
    assert faults >= {"bad-gpa", "bad-id", "chain-order", "indirect-size", "zero-length"}


@pytest.mark.slow
def test_more_chains_than_any_counter_holds() -> None:
    with native_ring(5, PACKED | EVENT_IDX) as native:
        for count in range(65536 + 10):
            id = native.driver.offer(Segment(DATA_GPA, 64, writable=True))
            assert native.use(count & 0xFF) == id
            assert native.driver.take_used() == [(id, count & 0xFF)]
            assert native.interrupted()
        stats = native.statistics()
        assert (stats.chains, stats.used, stats.next_avail) == (65546, 65546, 65546 % 5)
        assert stats.packed


@pytest.mark.parametrize(
    ("size", "desc", "driver", "device"),
    [
        (0, 0x1000, 0x2000, 0x3000),
        (1025, 0x1000, 0x20000, 0x30000),
        (0x10008, 0x1000, 0x20000, 0x30000),
        (8, 0x1008, 0x2000, 0x3000),
        (8, 0x1000, 0x2002, 0x3000),
        (8, 0x1000, 0x2000, 0x3002),
        (8, 4 * MIB - 64, 0x2000, 0x3000),
        (8, 0x1000, 4 * MIB, 0x3000),
        (8, 0x1000, 0x2000, 1 << 63),
        (8, (1 << 64) - 16, 0x2000, 0x3000),
    ],
)
def test_a_ring_of_bad_size_or_place_is_refused(
    native: NativeRing, size: int, desc: int, driver: int, device: int
) -> None:
    result = native.start_at(size, (desc, driver, device), PACKED)
    assert result in (-errno.EINVAL, -errno.EFAULT)
    assert native.pop() is None


@pytest.mark.parametrize("size", [1, 3, 1000, 1024])
def test_2_8_10_1_any_size_up_to_the_limit_is_taken(native: NativeRing, size: int) -> None:
    assert native.start_at(size, (0x20000, 0x30000, 0x30004), PACKED) == 0


@pytest.mark.parametrize("native", [5], indirect=True)
@pytest.mark.spec("2.8.18", "use a chain's descriptors in the order in which they became available")
def test_2_8_1_a_chain_goes_on_at_the_beginning_of_the_ring(native: NativeRing) -> None:
    spin(native, 3)
    segments = [Segment(DATA_GPA + 16 * at, 16) for at in range(4)]
    id = native.driver.offer(*segments)
    assert native.take() == OracleChain(id, tuple((s.gpa, 16) for s in segments), ())
    assert not native.pending
    native.push(id, 0)
    native.flush()
    assert native.driver.take_used() == [(id, 0)]
    assert native.statistics().next_used == 2


def test_2_8_4_used_descriptors_say_whether_anything_was_written(native: NativeRing) -> None:
    for written in (0, 5):
        native.driver.offer(Segment(DATA_GPA, 16, writable=True))
        native.use(written)
    assert descriptor(native, 0)[1:] == (0, 0, AVAIL | USED)
    assert descriptor(native, 1)[1:] == (5, 1, AVAIL | USED | WRITE)


def test_2_8_6_the_id_is_that_of_the_last_descriptor(native: NativeRing) -> None:
    for at, (id, flags) in enumerate([(900, AVAIL | NEXT), (9, AVAIL)]):
        native.memory.write(RING_GPA + 16 * at, struct.pack("<QIHH", DATA_GPA, 4, id, flags))
    assert native.take().head == 9


@pytest.mark.spec("2.8.12", "write used descriptors in the order in which buffers are done")
def test_2_8_6_a_used_descriptor_stands_for_its_chain(native: NativeRing) -> None:
    ids = [native.driver.offer(*[Segment(DATA_GPA, 8)] * length) for length in (3, 1, 2)]
    for chain in [native.take() for _ in ids][::-1]:
        native.push(chain.head, 0)
    native.flush()
    assert [descriptor(native, at)[2] for at in (0, 2, 3)] == ids[::-1]
    assert native.driver.take_used() == [(id, 0) for id in ids[::-1]]


def test_pushed_buffers_show_with_the_flush_all_at_once(native: NativeRing) -> None:
    ids = [native.driver.offer(Segment(DATA_GPA, 8)) for _ in range(3)]
    for _ in ids:
        native.push(native.take().head, 0)
    assert native.driver.take_used() == []
    native.flush()
    assert native.driver.take_used() == [(id, 0) for id in ids]


def test_2_8_7_a_table_is_taken_in_its_order(native: NativeRing) -> None:
    segments = [Segment(DATA_GPA + 64 * at, 32, writable=at > 1) for at in range(40)]
    id = native.driver.offer_indirect(TABLE_GPA, *segments)
    parts = tuple((s.gpa, 32) for s in segments)
    assert native.take() == OracleChain(id, parts[:2], parts[2:])


def test_2_8_7_in_a_table_only_the_write_flag_means_anything(native: NativeRing) -> None:
    for at, flags in enumerate((INDIRECT | AVAIL, NEXT | USED, WRITE | INDIRECT)):
        entry = struct.pack("<QIHH", DATA_GPA, 16, 0xFFFF, flags)
        native.memory.write(TABLE_GPA + 16 * at, entry)
    queue_of(native).offer_entries(3, (TABLE_GPA, 48, INDIRECT | WRITE))
    part = (DATA_GPA, 16)
    assert native.take() == OracleChain(3, (part, part), (part,))


@pytest.mark.parametrize("size_bytes", [0, 8, 24, 16 * 1025])
def test_an_indirect_table_of_bad_size_is_a_fault(native: NativeRing, size_bytes: int) -> None:
    queue_of(native).offer_entries(0, (TABLE_GPA, size_bytes, INDIRECT))
    assert native.fault_of_pop() == "indirect-size"


def test_an_indirect_table_need_not_be_aligned(native: NativeRing) -> None:
    segments = [Segment(DATA_GPA + 64 * at, 32) for at in range(3)]
    head = native.driver.offer_indirect(TABLE_GPA + 13, *segments)
    assert native.take() == OracleChain(head, tuple((s.gpa, 32) for s in segments), ())


def test_an_indirect_table_outside_memory_is_a_fault(native: NativeRing) -> None:
    queue_of(native).offer_entries(0, (4 * MIB - 16, 32, INDIRECT))
    assert native.fault_of_pop() == "bad-gpa"


@pytest.mark.parametrize(
    "entries",
    [
        [(TABLE_GPA, 16, INDIRECT | NEXT), (DATA_GPA, 16, 0)],
        [(DATA_GPA, 16, NEXT), (TABLE_GPA, 16, INDIRECT)],
    ],
    ids=["goes-on", "ends"],
)
def test_a_chain_of_which_a_table_is_a_part_is_a_fault(
    native: NativeRing, entries: list[tuple[int, int, int]]
) -> None:
    native.memory.write(TABLE_GPA, struct.pack("<QIHH", DATA_GPA, 16, 0, 0))
    queue_of(native).offer_entries(0, *entries)
    assert native.fault_of_pop() == "indirect-nested"


def test_indirect_without_the_feature_is_a_fault(native: NativeRing) -> None:
    native.stop()
    assert native.start(PACKED) == 0
    native.driver.offer_indirect(TABLE_GPA, Segment(DATA_GPA, 4))
    assert native.fault_of_pop() == "indirect-nested"


@pytest.mark.parametrize("id", [16, 1024, 0xFFFF])
def test_an_id_outside_the_ring_is_a_fault(native: NativeRing, id: int) -> None:
    queue_of(native).offer_entries(id, (DATA_GPA, 8, 0))
    assert native.fault_of_pop() == "bad-id"


def test_an_id_that_is_in_flight_is_a_fault(native: NativeRing) -> None:
    for _ in range(2):
        queue_of(native).offer_entries(7, (DATA_GPA, 8, 0))
    assert native.take().head == 7
    assert native.fault_of_pop() == "bad-id"


def test_an_id_may_come_again_after_its_use(native: NativeRing) -> None:
    for _ in range(40):
        queue_of(native).offer_entries(7, (DATA_GPA, 8, 0))
        assert native.use() == 7
        queue_of(native).room += 1


def test_a_chain_without_an_end_is_a_fault(native: NativeRing) -> None:
    queue_of(native).offer_entries(0, *[(DATA_GPA, 8, NEXT)] * 16)
    assert native.fault_of_pop() == "chain-loop"


def test_a_chain_that_runs_into_one_in_flight_is_a_fault(native: NativeRing) -> None:
    native.driver.offer(Segment(DATA_GPA, 8), Segment(DATA_GPA, 8))
    native.take()
    queue_of(native).offer_entries(5, *[(DATA_GPA, 8, NEXT)] * 14)
    assert native.fault_of_pop() == "chain-loop"


@pytest.mark.parametrize("flags", [0, USED | AVAIL, USED], ids=["new", "used", "next round's"])
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.spec("2.8.15", "use no descriptor before it sees that it became available")
def test_a_chain_of_which_a_part_is_not_available_is_a_fault(
    native: NativeRing, at: int, flags: int
) -> None:
    native.driver.offer(*[Segment(DATA_GPA, 8)] * 3)
    entry = struct.pack("<QIHH", DATA_GPA, 8, 0, flags | (NEXT if at == 1 else 0))
    native.memory.write(RING_GPA + 16 * at, entry)
    assert native.fault_of_pop() == "chain-cut"


@pytest.mark.parametrize("native", [4], indirect=True)
def test_a_descriptor_made_available_again_in_flight_is_a_fault(native: NativeRing) -> None:
    for _ in range(4):
        native.driver.offer(Segment(DATA_GPA, 8))
        native.take()
    assert native.pop() is None
    queue_of(native).room += 1
    queue_of(native).offer_entries(0, (DATA_GPA, 8, 0))
    assert native.fault_of_pop() == "chain-loop"


def test_descriptors_rewritten_after_they_were_taken_change_nothing(native: NativeRing) -> None:
    id = native.driver.offer(Segment(DATA_GPA, 16), Segment(DATA_GPA + 64, 16, writable=True))
    chain = native.take()
    for at in range(16):
        native.memory.write(RING_GPA + 16 * at, b"\xff" * 16)
    native.push(chain.head, 16)
    native.flush()
    assert native.driver.take_used()[0] == (id, 16)
    assert descriptor(native, 0)[1:] == (16, id, AVAIL | USED | WRITE)


@pytest.mark.parametrize(
    "gpa", [4 * MIB, 4 * MIB - 3, (1 << 64) - 4, 0xD0000000], ids=["end", "across", "wrap", "mmio"]
)
def test_memory_the_guest_does_not_have_is_a_fault(native: NativeRing, gpa: int) -> None:
    native.driver.offer(Segment(gpa, 4))
    assert native.fault_of_pop() == "bad-gpa"


def test_readable_after_writable_is_a_fault(native: NativeRing) -> None:
    native.driver.offer(Segment(DATA_GPA, 4, writable=True), Segment(DATA_GPA, 4))
    assert native.fault_of_pop() == "chain-order"


def test_an_empty_segment_is_a_fault(native: NativeRing) -> None:
    native.driver.offer(Segment(DATA_GPA, 0))
    assert native.fault_of_pop() == "zero-length"


def test_four_gigabytes_in_a_chain_are_a_fault(native: NativeRing) -> None:
    native.driver.offer(
        *[Segment(DATA_GPA, 2 * MIB, writable=True)] * 3,
        Segment(DATA_GPA, 0xFFFF_FFFF, writable=True),
    )
    assert native.fault_of_pop() == "chain-bytes"


def test_a_chain_of_the_whole_ring_is_taken(native: NativeRing) -> None:
    for _ in range(3):
        segments = [Segment(DATA_GPA + 16 * at, 16) for at in range(16)]
        id = native.driver.offer(*segments)
        assert native.take() == OracleChain(id, tuple((s.gpa, 16) for s in segments), ())
        native.push(id, 0)
        assert native.flush()
        assert native.driver.take_used() == [(id, 0)]


def test_a_faulty_ring_stays_dead_until_it_is_started_again(native: NativeRing) -> None:
    assert native.driver.offer_broken() == "bad-id"
    assert native.pending
    assert [native.fault_of_pop() for _ in range(2)] == ["bad-id"] * 2
    assert not native.pending
    assert not native.kicks_on()
    native.stop()
    assert native.pop() is None
    native.memory.write(RING_GPA, bytes(16))
    assert native.start() == 0
    assert native.pop() is None


@pytest.mark.parametrize("native", [5], indirect=True)
def test_chains_are_given_back_from_the_last_to_the_first(native: NativeRing) -> None:
    spin(native, 3)
    for length in (1, 2, 2):
        native.driver.offer(*[Segment(DATA_GPA, 8)] * length)
    taken = [native.take() for _ in range(3)]
    for _ in range(2):
        native.unpop()
    assert [native.pop(), native.pop(), native.pop()] == [*taken[1:], None]
    for _ in range(3):
        native.unpop()
    assert [native.use() for _ in range(3)] == [chain.head for chain in taken]
    assert len(native.driver.take_used()) == 3


@pytest.mark.parametrize("count", [0, 3, 5, 9, 10, 13])
@pytest.mark.parametrize("native", [5], indirect=True)
def test_a_ring_goes_on_where_another_left_off(native: NativeRing, count: int) -> None:
    spin(native, count)
    base = native.stop()
    place = count % 5 | (0 if count // 5 % 2 else WRAP)
    assert base == place << 16 | place
    assert native.start(base=base) == 0
    assert native.pop() is None
    id = native.driver.offer(Segment(DATA_GPA, 8, writable=True))
    assert native.use(4) == id
    assert native.driver.take_used() == [(id, 4)]


def test_a_base_of_one_half_stands_for_both(native: NativeRing) -> None:
    spin(native, 7)
    native.stop()
    assert native.start(base=7 | WRAP) == 0
    id = native.driver.offer(Segment(DATA_GPA, 8))
    native.use()
    assert native.driver.take_used() == [(id, 0)]


@pytest.mark.parametrize("base", [16, 16 | WRAP, 0x10_8000, 0x7FFF_0001, 0xFFFF_FFFF])
def test_a_base_outside_the_ring_is_refused(native: NativeRing, base: int) -> None:
    assert native.start(base=base) == -errno.EINVAL


@pytest.mark.spec("6.2", "with IN_ORDER use buffers in the order in which they became available")
def test_2_8_8_one_descriptor_speaks_for_what_was_written_wholly() -> None:
    with native_ring(8, PACKED | features.IN_ORDER) as native:
        for at in range(4):
            native.driver.offer(*[Segment(DATA_GPA, 16, writable=at > 1)] * (1 + at % 2))
        chains = [native.take() for _ in range(4)]
        for chain, written in zip(chains, (0, 0, 7, 32), strict=True):
            native.push(chain.head, written)
        assert native.driver.take_used() == []
        native.flush()
        # The first speaks for three chains of four descriptors, up to the one written in part.
        assert descriptor(native, 0)[1:] == (7, 2, AVAIL | USED | WRITE)
        assert descriptor(native, 4)[1:] == (32, 3, AVAIL | USED | WRITE)
        assert native.driver.take_used() == [(0, 0), (1, 0), (2, 7), (3, 32)]


def test_2_8_8_a_batch_has_the_wrap_counter_of_where_it_begins() -> None:
    with native_ring(4, PACKED | features.IN_ORDER) as native:
        spin(native, 3)
        ids = [native.driver.offer(Segment(DATA_GPA, 8)) for _ in range(3)]
        for chain in [native.take() for _ in ids]:
            native.push(chain.head, 0)
        native.flush()
        assert descriptor(native, 3)[2:] == (ids[-1], AVAIL | USED)
        assert native.driver.take_used() == [(id, 0) for id in ids]


@pytest.mark.parametrize(
    ("event_idx", "offset", "flags", "expected"),
    [
        (0, 0, EVENT_ENABLE, True),
        (0, 0, EVENT_DISABLE, False),
        (0, 0, EVENT_DESC, True),  # means nothing without EVENT_IDX
        (EVENT_IDX, 0, EVENT_ENABLE, True),
        (EVENT_IDX, 0, EVENT_DISABLE, False),
        (EVENT_IDX, 0, 3, True),  # reserved
        (EVENT_IDX, 0, 0xFFFD, False),  # as are the upper bits: the lowest two say DISABLE
        (EVENT_IDX, 2 | WRAP, EVENT_DESC, False),  # used already
        (EVENT_IDX, 3 | WRAP, EVENT_DESC, True),
        (EVENT_IDX, 4 | WRAP, EVENT_DESC, True),  # in the middle of a chain
        (EVENT_IDX, 4, EVENT_DESC, False),  # of the round after next
        (EVENT_IDX, 0, EVENT_DESC, True),  # after the ring's end
        (EVENT_IDX, 0 | WRAP, EVENT_DESC, False),
        (EVENT_IDX, 1, EVENT_DESC, False),  # not used yet
        (EVENT_IDX, 0x7FFF | WRAP, EVENT_DESC, False),
        (EVENT_IDX, 5 | WRAP, EVENT_DESC, True),  # outside the ring: where it would be
    ],
)
def test_2_8_14_the_driver_is_interrupted_for_the_descriptor_it_names(
    event_idx: int, offset: int, flags: int, expected: bool
) -> None:
    with native_ring(5, PACKED | event_idx) as native:
        spin(native, 3)
        for length in (2, 1):
            native.driver.offer(*[Segment(DATA_GPA, 8)] * length)
        queue_of(native).write_event(offset, flags)
        for chain in [native.take(), native.take()]:
            native.push(chain.head, 0)
        assert native.flush() == expected
        assert native.statistics().suppressed == (not expected)


def test_2_8_14_kicks_are_asked_for_at_the_next_descriptor() -> None:
    with native_ring(5, PACKED | EVENT_IDX) as native:
        spin(native, 3)
        assert not native.kicks_on()
        assert device_event(native) == (3 | WRAP, EVENT_DESC)
        native.kicks_off()
        assert device_event(native)[1] == EVENT_DISABLE
        native.driver.offer(Segment(DATA_GPA, 8), Segment(DATA_GPA, 8))
        assert native.kicks_on()
        native.take()
        assert not native.kicks_on()
        assert device_event(native) == (0, EVENT_DESC)


def test_2_8_14_without_event_idx_kicks_are_on_or_off(native: NativeRing) -> None:
    native.kicks_off()
    assert device_event(native) == (0, EVENT_DISABLE)
    assert not native.kicks_on()
    assert device_event(native) == (0, EVENT_ENABLE)


def test_a_ring_that_goes_on_does_not_rely_on_what_it_asked_for_before(native: NativeRing) -> None:
    native.kicks_off()
    base = native.stop()
    native.memory.write(native.driver.device_gpa, bytes(4))
    assert native.start(base=base) == 0
    native.kicks_off()
    assert device_event(native) == (0, EVENT_DISABLE)


def test_a_stopped_ring_writes_nothing(native: NativeRing) -> None:
    native.driver.offer(Segment(DATA_GPA, 8, writable=True))
    chain = native.take()
    before = native.memory.read(RING_GPA, 0x1000)
    native.stop()
    native.push(chain.head, 8)
    assert not native.flush()
    native.kicks_off()
    assert not native.kicks_on()
    assert native.memory.read(RING_GPA, 0x1000) == before
