"""native/vring_split.c against the oracle, and against drivers that break the rules (virtio 1.3,
2.7)."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

import pytest

from avmm.units import MIB
from avmm.virtio import features
from fakes.driver_queue import INDIRECT, NEXT, WRITE, Segment
from fakes.native_ring import (
    DATA_GPA,
    RING_GPA,
    TABLE_GPA,
    NativeRing,
    native_ring,
    play_garbage,
    play_histories,
)
from fakes.ring import OracleChain, OracleRing


@pytest.fixture
def native() -> Iterator[NativeRing]:
    with native_ring(16, 0) as native:
        yield native


@pytest.mark.parametrize("in_order", [0, features.IN_ORDER])
@pytest.mark.parametrize("event_idx", [0, features.RING_EVENT_IDX])
@pytest.mark.parametrize("size", [1, 2, 8, 64, 256])
def test_random_histories_equal_the_oracles(size: int, event_idx: int, in_order: int) -> None:
    play_histories(OracleRing, size, event_idx | in_order, seeds=8, steps=250)


@pytest.mark.parametrize("event_idx", [0, features.RING_EVENT_IDX])
def test_whatever_a_driver_writes_stays_in_memory(event_idx: int) -> None:
    faults = play_garbage(8, event_idx, seeds=20, steps=200)
    assert faults >= {"avail-jump", "bad-gpa", "bad-head", "indirect-size", "zero-length"}


@pytest.mark.slow
@pytest.mark.parametrize("event_idx", [0, features.RING_EVENT_IDX])
def test_indices_wrap_at_65536(event_idx: int) -> None:
    with native_ring(4, event_idx) as native:
        buffer = Segment(DATA_GPA, 64, writable=True)
        for count in range(65536 + 10):
            head = native.driver.offer(buffer)
            assert native.use(count & 0xFF) == head
            assert native.driver.take_used() == [(head, count & 0xFF)]
            assert native.interrupted()
        stats = native.statistics()
        assert (stats.chains, stats.used, stats.next_avail) == (65546, 65546, 10)


@pytest.mark.parametrize(
    ("size", "desc", "driver", "device"),
    [
        (0, 0x1000, 0x2000, 0x3000),
        (3, 0x1000, 0x2000, 0x3000),
        (2048, 0x1000, 0x20000, 0x30000),
        (0x10008, 0x1000, 0x2000, 0x3000),
        (8, 0x1008, 0x2000, 0x3000),
        (8, 0x1000, 0x2001, 0x3000),
        (8, 0x1000, 0x2000, 0x3002),
        (8, 4 * MIB - 64, 0x2000, 0x3000),
        (8, 0x1000, 4 * MIB - 4, 0x3000),
        (8, 0x1000, 0x2000, 1 << 63),
        (8, (1 << 64) - 16, 0x2000, 0x3000),
    ],
)
def test_a_ring_of_bad_size_or_place_is_refused(
    native: NativeRing, size: int, desc: int, driver: int, device: int
) -> None:
    result = native.start_at(size, (desc, driver, device), 0)
    assert result in (-errno.EINVAL, -errno.EFAULT)


def test_a_head_outside_the_table_is_a_fault(native: NativeRing) -> None:
    native.driver.offer_head(16)
    assert native.fault_of_pop() == "bad-head"


def test_a_next_outside_the_table_is_a_fault(native: NativeRing) -> None:
    native.driver.write_desc(0, DATA_GPA, 4, NEXT, 500)
    native.driver.offer_head(0)
    assert native.fault_of_pop() == "bad-head"


def test_a_chain_that_bites_its_tail_is_a_fault(native: NativeRing) -> None:
    native.driver.write_desc(0, DATA_GPA, 4, NEXT, 1)
    native.driver.write_desc(1, DATA_GPA, 4, NEXT, 0)
    native.driver.offer_head(0)
    assert native.fault_of_pop() == "chain-loop"


def test_an_index_that_jumps_past_the_ring_is_a_fault(native: NativeRing) -> None:
    native.driver.set_avail_idx(17)
    assert native.fault_of_pop() == "avail-jump"


@pytest.mark.parametrize(
    "gpa", [4 * MIB, 4 * MIB - 3, (1 << 64) - 4, 0xD0000000], ids=["end", "across", "wrap", "mmio"]
)
def test_memory_the_guest_does_not_have_is_a_fault(native: NativeRing, gpa: int) -> None:
    native.driver.write_desc(0, gpa, 4, 0, 0)
    native.driver.offer_head(0)
    assert native.fault_of_pop() == "bad-gpa"


def test_readable_after_writable_is_a_fault(native: NativeRing) -> None:
    native.driver.offer(Segment(DATA_GPA, 4, writable=True), Segment(DATA_GPA, 4))
    assert native.fault_of_pop() == "chain-order"


def test_an_empty_segment_is_a_fault(native: NativeRing) -> None:
    native.driver.offer(Segment(DATA_GPA, 0))
    assert native.fault_of_pop() == "zero-length"


@pytest.mark.parametrize("size_bytes", [0, 8, 24, 16 * 2048])
def test_an_indirect_table_of_bad_size_is_a_fault(native: NativeRing, size_bytes: int) -> None:
    native.driver.write_desc(0, TABLE_GPA, size_bytes, INDIRECT, 0)
    native.driver.offer_head(0)
    assert native.fault_of_pop() == "indirect-size"


def test_an_indirect_table_need_not_be_aligned(native: NativeRing) -> None:
    segments = [Segment(DATA_GPA + 64 * at, 32) for at in range(3)]
    head = native.driver.offer_indirect(TABLE_GPA + 13, *segments)
    assert native.take() == OracleChain(head, tuple((s.gpa, 32) for s in segments), ())


def test_an_indirect_table_inside_another_is_a_fault(native: NativeRing) -> None:
    native.memory.write(TABLE_GPA, struct.pack("<QIHH", TABLE_GPA, 16, INDIRECT, 0))
    native.driver.write_desc(0, TABLE_GPA, 16, INDIRECT, 0)
    native.driver.offer_head(0)
    assert native.fault_of_pop() == "indirect-nested"


def test_a_ring_that_is_its_own_indirect_table_is_a_fault(native: NativeRing) -> None:
    native.driver.write_desc(0, native.driver.desc_gpa, 16, INDIRECT, 0)
    native.driver.offer_head(0)
    assert native.fault_of_pop() == "indirect-nested"


def test_an_indirect_table_that_goes_on_in_the_ring_is_a_fault(native: NativeRing) -> None:
    native.driver.write_desc(0, TABLE_GPA, 16, INDIRECT | NEXT, 1)
    native.driver.offer_head(0)
    assert native.fault_of_pop() == "indirect-nested"


def test_indirect_without_the_feature_is_a_fault(native: NativeRing) -> None:
    native.stop()
    assert native.start(0) == 0
    native.driver.offer_indirect(TABLE_GPA, Segment(DATA_GPA, 4))
    assert native.fault_of_pop() == "indirect-nested"


def test_four_gigabytes_in_a_chain_are_a_fault(native: NativeRing) -> None:
    for index in range(3):
        native.driver.write_desc(index, DATA_GPA, 2 * MIB, WRITE | NEXT, index + 1)
    native.driver.write_desc(3, DATA_GPA, 0xFFFF_FFFF, WRITE, 0)
    native.driver.offer_head(0)
    assert native.fault_of_pop() == "chain-bytes"


def test_a_chain_of_the_whole_table_is_taken(native: NativeRing) -> None:
    segments = [Segment(DATA_GPA + 16 * i, 16) for i in range(16)]
    head = native.driver.offer(*segments)
    chain = native.pop()
    assert chain == OracleChain(head, tuple((s.gpa, 16) for s in segments), ())


def test_a_faulty_ring_stays_dead_until_it_is_started_again(native: NativeRing) -> None:
    native.driver.offer_head(99)
    assert native.fault_of_pop() == "bad-head"
    native.driver.set_avail_idx(0)
    assert native.fault_of_pop() == "bad-head"
    native.stop()
    assert native.pop() is None
    assert native.start() == 0
    assert native.pop() is None
    native.driver.offer(Segment(DATA_GPA, 8))
    assert native.pop() is not None


def test_a_chain_given_back_is_taken_again(native: NativeRing) -> None:
    native.driver.offer(Segment(DATA_GPA, 8))
    first = native.pop()
    native.unpop()
    assert native.pop() == first
    assert native.pop() is None


def test_chains_are_given_back_from_the_last_to_the_first(native: NativeRing) -> None:
    for at in range(3):
        native.driver.offer(Segment(DATA_GPA + 16 * at, 8))
    taken = [native.pop() for _ in range(3)]
    for _ in range(2):
        native.unpop()
    assert [native.pop(), native.pop(), native.pop()] == [*taken[1:], None]


def test_pending_is_whether_pop_would_take_one(native: NativeRing) -> None:
    assert not native.pending
    native.driver.offer(Segment(DATA_GPA, 8))
    assert native.pending
    assert native.pop() is not None
    assert not native.pending
    native.driver.offer_head(99)
    assert native.fault_of_pop() == "bad-head"
    native.stop()
    assert not native.pending


def test_a_ring_goes_on_where_another_left_off(native: NativeRing) -> None:
    for _ in range(21):
        native.driver.offer(Segment(DATA_GPA, 8, writable=True))
        native.use(8)
        native.driver.take_used()
    base = native.stop()
    assert base == 21
    native.driver.offer(Segment(DATA_GPA, 8, writable=True))
    assert native.start(base=base) == 0
    assert native.driver.take_used() == []
    head = native.use(4)
    assert native.driver.take_used() == [(head, 4)]
    assert native.pop() is None


def test_a_base_past_the_index_is_refused(native: NativeRing) -> None:
    assert native.start(base=0x1_0000) == -errno.EINVAL


@pytest.mark.spec("6.2", "with IN_ORDER use buffers in the order in which they became available")
def test_in_order_one_element_speaks_for_what_was_written_wholly() -> None:
    with native_ring(8, features.IN_ORDER) as native:
        for at in range(4):
            native.driver.offer(Segment(DATA_GPA + 16 * at, 16, writable=at > 1))
        chains = [native.take() for _ in range(4)]
        for chain, written in zip(chains, (0, 0, 7, 16), strict=True):
            native.push(chain.head, written)
        native.flush()
        ring = native.memory.read(native.driver.device_gpa + 4, 32)
        # The first speaks for three, up to the one that was written in part.
        assert struct.unpack("<8I", ring) == (2, 7, 0, 0, 0, 0, 3, 16)
        assert native.driver.take_used() == [(0, 0), (1, 0), (2, 7), (3, 16)]


def test_in_order_a_batch_ends_with_a_flush() -> None:
    with native_ring(8, features.IN_ORDER) as native:
        for _ in range(2):
            native.driver.offer(Segment(DATA_GPA, 16))
            native.use()
            assert native.interrupted()
        assert struct.unpack("<4I", native.memory.read(native.driver.device_gpa + 4, 16)) == (
            *(0, 0),
            *(1, 0),
        )


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
