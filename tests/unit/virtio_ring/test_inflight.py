"""What is in flight, in memory that outlives a back-end: one dies, the next takes over."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from avmm.native import CData, ffi, lib
from fakes.driver_queue import Segment
from fakes.native_ring import DATA_GPA, NativeRing, native_ring

SIZE = 8
HEAD = struct.Struct("<QHHHH")
DESC = struct.Struct("<B5xHQ")


@dataclass
class Kept:
    """A ring that keeps what is in flight in `region`."""

    native: NativeRing
    region: CData = field(
        default_factory=lambda: ffi.new("uint8_t[]", lib.av_vring_inflight_bytes(SIZE))
    )

    def start(self, base: int = 0) -> None:
        """As the next back-end does; `base` is what the front-end believes."""
        queue, setup = self.native.driver, ffi.new("struct av_vring_setup *")
        setup.desc_gpa, setup.driver_gpa = queue.desc_gpa, queue.driver_gpa
        setup.device_gpa, setup.features = queue.device_gpa, self.native.negotiated
        setup.size, setup.resume, setup.base, setup.inflight = SIZE, True, base, self.region
        assert lib.av_vring_start(self.native.ring, setup) == 0

    def offer(self, count: int) -> list[int]:
        return [self.native.driver.offer(Segment(DATA_GPA, 16)) for _ in range(count)]

    def take(self, count: int) -> list[int]:
        return [self.native.take().head for _ in range(count)]

    def descs(self) -> list[tuple[int, int, int]]:
        """(in flight, next, counter) of each head."""
        data = bytes(ffi.buffer(self.region))
        return list(DESC.iter_unpack(data[HEAD.size :]))

    def in_flight(self) -> list[int]:
        return [head for head, (flag, _, _) in enumerate(self.descs()) if flag]

    def head(self) -> tuple[int, ...]:
        return HEAD.unpack(bytes(ffi.buffer(self.region, HEAD.size)))

    def write(self, at: int, data: bytes) -> None:
        ffi.buffer(self.region)[at : at + len(data)] = data


@pytest.fixture
def kept() -> Iterator[Kept]:
    with native_ring(SIZE, 0) as native:
        kept = Kept(native)
        kept.start()
        yield kept


def test_chains_are_in_flight_from_pop_to_flush(kept: Kept) -> None:
    heads = kept.offer(3)
    assert kept.in_flight() == []
    assert kept.take(3) == heads
    assert kept.in_flight() == heads
    assert [kept.descs()[head][2] for head in heads] == [0, 1, 2]
    kept.native.push(heads[1], 0)
    assert kept.in_flight() == heads
    kept.native.flush()
    assert kept.in_flight() == [heads[0], heads[2]]
    assert kept.head() == (0, 1, SIZE, heads[1], 1)


def test_the_next_one_takes_again_what_was_in_flight_and_then_goes_on(kept: Kept) -> None:
    heads = kept.offer(5)
    kept.take(4)
    for head in (heads[2], heads[0]):  # out of order, as disks are
        kept.native.push(head, 0)
    kept.native.flush()
    kept.start(base=2)
    assert kept.native.pending
    assert kept.take(3) == [heads[1], heads[3], heads[4]]
    assert kept.native.pop() is None
    for head in (heads[4], heads[1], heads[3]):
        kept.native.push(head, 0)
    kept.native.flush()
    assert kept.in_flight() == []
    assert sorted(head for head, _ in kept.native.driver.take_used()) == sorted(heads)


def test_death_between_the_ring_and_the_region(kept: Kept) -> None:
    heads = kept.offer(3)
    kept.take(3)
    kept.native.push(heads[0], 0)
    kept.native.push(heads[2], 0)
    before = bytes(ffi.buffer(kept.region))
    kept.native.flush()
    kept.write(0, before)  # the driver has seen the batch, and the region does not know yet
    kept.start(base=2)
    assert kept.in_flight() == [heads[1]]
    assert kept.take(1) == [heads[1]]
    assert kept.native.pop() is None


def test_death_before_the_batch_is_shown(kept: Kept) -> None:
    heads = kept.offer(3)
    kept.take(3)
    kept.native.push(heads[1], 0)
    kept.start()
    assert kept.take(3) == heads


def test_death_while_they_are_taken_again_does_not_change_their_order(kept: Kept) -> None:
    heads = kept.offer(3)
    kept.take(3)
    kept.start()
    kept.take(1)
    kept.start()
    assert kept.take(3) == heads


def test_a_new_life_of_the_ring_begins_with_nothing(kept: Kept) -> None:
    for _ in range(20):
        kept.offer(1)
        kept.native.use()
        kept.native.driver.take_used()
    kept.offer(1)
    kept.take(1)
    kept.native.memory.write(kept.native.driver.device_gpa, bytes(4))
    kept.native.memory.write(kept.native.driver.driver_gpa, bytes(4))
    kept.start()
    assert kept.in_flight() == []
    assert not kept.native.pending


@pytest.mark.parametrize("at", range(0, 16 + 16 * SIZE, 2))
def test_whatever_the_region_holds_the_ring_starts(kept: Kept, at: int) -> None:
    heads = kept.offer(4)
    kept.take(3)
    kept.native.push(heads[1], 0)
    for value in (0, 1, 7, 8, 9, 0x7FFF, 0xFFFF):
        copy = bytes(ffi.buffer(kept.region))
        kept.write(at, struct.pack("<H", value))
        kept.start()
        taken = 0
        while taken <= 2 * SIZE and kept.native.fault == "none" and kept.native.pending:
            with contextlib.suppress(OSError):
                kept.native.take()
            taken += 1
        assert taken <= 2 * SIZE
        kept.write(0, copy)


def test_a_ring_without_such_memory_takes_nothing_again(kept: Kept) -> None:
    heads = kept.offer(2)
    kept.take(2)
    kept.native.push(heads[0], 0)
    kept.native.flush()
    kept.native.start(base=2)
    assert not kept.native.pending
    assert kept.native.pop() is None
