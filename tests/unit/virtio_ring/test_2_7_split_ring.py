"""native/vring.c against the oracle, and against drivers that break the rules (virtio 1.3, 2.7)."""

from __future__ import annotations

import errno
import functools
import os
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from avmm.mem.guest import GuestMemory
from avmm.native import CData, ffi, lib
from avmm.units import MIB
from avmm.virtio import features
from fakes.driver_queue import INDIRECT, NEXT, WRITE, DriverQueue, Segment
from fakes.ring import OracleChain, OracleRing

RING_GPA = 0x10000
DATA_GPA = 0x100000
TABLE_GPA = 0x80000
IOV_MAX = 1024


@dataclass
class Native:
    """A native ring over memory of its own, with the driver that feeds it."""

    memory: GuestMemory
    driver: DriverQueue
    ring: CData
    irq_fd: int

    def pop(self) -> OracleChain | None:
        chain, iov = ffi.new("struct av_chain *"), ffi.new("struct iovec[]", IOV_MAX)
        result = lib.av_vring_pop(self.ring, chain, iov, IOV_MAX)
        if result < 0:
            raise OSError(-result, ffi.string(lib.av_fault_name(self.fault)).decode())
        if not result:
            return None
        parts = [self.segment(iov[i]) for i in range(chain.readable + chain.writable)]
        readable, writable = parts[: chain.readable], parts[chain.readable :]
        assert chain.readable_bytes == sum(size for _, size in readable)
        assert chain.writable_bytes == sum(size for _, size in writable)
        return OracleChain(chain.head, tuple(readable), tuple(writable))

    def segment(self, iov: CData) -> tuple[int, int]:
        hva = int(ffi.cast("uintptr_t", iov.iov_base))
        [region] = [r for r in self.memory.regions if r.hva <= hva < r.hva + r.size_bytes]
        return hva - region.hva + region.gpa, int(iov.iov_len)

    @property
    def fault(self) -> int:
        return lib.av_vring_fault(self.ring)

    def interrupted(self) -> bool:
        try:
            return os.eventfd_read(self.irq_fd) > 0
        except BlockingIOError:
            return False

    def fault_of_pop(self) -> str:
        with pytest.raises(OSError, match=r".") as caught:
            self.pop()
        assert caught.value.errno == errno.EPROTO
        return str(caught.value.strerror)


@pytest.fixture
def native(request: pytest.FixtureRequest) -> Iterator[Native]:
    yield from make_native(getattr(request, "param", 16), event_idx=False)


def make_native(size: int, *, event_idx: bool) -> Iterator[Native]:
    memory = GuestMemory.create(4 * MIB)
    driver = DriverQueue(memory, RING_GPA, size, event_idx=event_idx)
    irq_fd = os.eventfd(0, os.EFD_NONBLOCK)
    interrupt = lib.av_interrupt_create(irq_fd)
    ring = lib.av_vring_create(memory.native, interrupt)
    offered = features.RING_INDIRECT_DESC | (features.RING_EVENT_IDX if event_idx else 0)
    assert start(ring, driver, offered) == 0
    yield Native(memory, driver, ring, irq_fd)
    lib.av_vring_destroy(ring)
    lib.av_interrupt_destroy(interrupt)
    os.close(irq_fd)
    memory.close()


def start(ring: CData, driver: DriverQueue, offered: int, *, base: int | None = None) -> int:
    return start_at(
        ring, driver.size, driver.desc_gpa, driver.driver_gpa, driver.device_gpa, offered, base
    )


def start_at(
    ring: CData,
    size: int,
    desc: int,
    driver: int,
    device: int,
    offered: int,
    base: int | None = None,
) -> int:
    setup = ffi.new("struct av_vring_setup *")
    setup.desc_gpa, setup.driver_gpa, setup.device_gpa = desc, driver, device
    setup.size, setup.features = size, offered
    if base is not None:
        setup.resume, setup.base = True, base
    return lib.av_vring_start(ring, setup)


def random_segments(rng: random.Random, at_most: int) -> list[Segment]:
    readable, writable = rng.randint(0, at_most), rng.randint(0, at_most)
    count = max(1, readable + writable)
    return [
        Segment(DATA_GPA + rng.randrange(0x1000), rng.randint(1, 5000), writable=i >= readable)
        for i in range(count)
    ]


class History:
    """One random history, played on the native ring and on the oracle with equal memories."""

    def __init__(self, native: Native, oracle: OracleRing, driver: DriverQueue, seed: int) -> None:
        self.native, self.oracle, self.driver = native, oracle, driver
        self.rng = random.Random(seed)
        self.taken: list[int] = []
        self.offered = 0
        self.free = native.driver.size
        self.chain_sizes: dict[int, int] = {}

    def play(self, steps: int) -> None:
        step = (self.offer, self.offer, self.pop, self.pop, self.give_back, self.suppress)
        for _ in range(steps):
            self.rng.choice(step)()
            assert self.device_area(self.native.memory) == self.device_area(self.oracle.memory)

    def device_area(self, memory: GuestMemory) -> bytes:
        start = self.driver.device_gpa
        return memory.read(start, self.driver.end_gpa - start)

    def offer(self) -> None:
        segments = random_segments(self.rng, min(3, self.driver.size // 2))
        indirect = self.rng.random() < 0.3
        cost = 1 if indirect else len(segments)
        if cost > self.free:
            return
        self.offered += 1
        table = TABLE_GPA + self.offered * 0x100  # never one that may still be in use
        for driver in (self.native.driver, self.driver):
            offer = functools.partial(driver.offer_indirect, table) if indirect else driver.offer
            head = offer(*segments)
        self.chain_sizes[head] = cost
        self.free -= cost

    def pop(self) -> None:
        chain = self.native.pop()
        assert chain == self.oracle.pop()
        if chain is not None:
            self.taken.append(chain.head)

    def give_back(self) -> None:
        self.rng.shuffle(self.taken)
        for _ in range(self.rng.randint(0, len(self.taken))):
            head, written = self.taken.pop(), self.rng.randrange(1 << 16)
            lib.av_vring_push(self.native.ring, head, written)
            self.oracle.push(head, written)
        lib.av_vring_flush(self.native.ring)
        assert self.native.interrupted() == self.oracle.flush()
        if self.rng.random() < 0.5:
            used = self.native.driver.take_used()
            assert used == self.driver.take_used()
            self.free += sum(self.chain_sizes[head] for head, _ in used)

    def suppress(self) -> None:
        if self.rng.random() < 0.5:
            lib.av_vring_kicks_off(self.native.ring)
            self.oracle.kicks_off()
        else:
            assert bool(lib.av_vring_kicks_on(self.native.ring)) == self.oracle.kicks_on()


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("size", [1, 2, 8, 64, 256])
def test_random_histories_equal_the_oracles(size: int, event_idx: bool) -> None:
    for seed in range(8):
        for native in make_native(size, event_idx=event_idx):
            memory = GuestMemory.create(4 * MIB)
            driver = DriverQueue(memory, RING_GPA, size, event_idx=event_idx)
            oracle = OracleRing(
                memory, driver.desc_gpa, driver.driver_gpa, driver.device_gpa, size, event_idx
            )
            History(native, oracle, driver, seed).play(250)
            memory.close()


@pytest.mark.slow
@pytest.mark.parametrize("event_idx", [False, True])
def test_indices_wrap_at_65536(event_idx: bool) -> None:
    for native in make_native(4, event_idx=event_idx):
        buffer = Segment(DATA_GPA, 64, writable=True)
        for count in range(65536 + 10):
            head = native.driver.offer(buffer)
            chain = native.pop()
            assert chain is not None
            lib.av_vring_push(native.ring, head, count & 0xFF)
            lib.av_vring_flush(native.ring)
            assert native.driver.take_used() == [(head, count & 0xFF)]
            assert native.interrupted()
        stats = ffi.new("struct av_vring_stats *")
        lib.av_vring_statistics(native.ring, stats)
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
    native: Native, size: int, desc: int, driver: int, device: int
) -> None:
    result = start_at(native.ring, size, desc, driver, device, 0)
    assert result in (-errno.EINVAL, -errno.EFAULT)


def test_a_head_outside_the_table_is_a_fault(native: Native) -> None:
    native.driver.offer_head(16)
    assert native.fault_of_pop() == "bad-head"


def test_a_next_outside_the_table_is_a_fault(native: Native) -> None:
    native.driver.write_desc(0, DATA_GPA, 4, NEXT, 500)
    native.driver.offer_head(0)
    assert native.fault_of_pop() == "bad-head"


def test_a_chain_that_bites_its_tail_is_a_fault(native: Native) -> None:
    native.driver.write_desc(0, DATA_GPA, 4, NEXT, 1)
    native.driver.write_desc(1, DATA_GPA, 4, NEXT, 0)
    native.driver.offer_head(0)
    assert native.fault_of_pop() == "chain-loop"


def test_an_index_that_jumps_past_the_ring_is_a_fault(native: Native) -> None:
    native.driver.set_avail_idx(17)
    assert native.fault_of_pop() == "avail-jump"


@pytest.mark.parametrize(
    "gpa", [4 * MIB, 4 * MIB - 3, (1 << 64) - 4, 0xD0000000], ids=["end", "across", "wrap", "mmio"]
)
def test_memory_the_guest_does_not_have_is_a_fault(native: Native, gpa: int) -> None:
    native.driver.write_desc(0, gpa, 4, 0, 0)
    native.driver.offer_head(0)
    assert native.fault_of_pop() == "bad-gpa"


def test_readable_after_writable_is_a_fault(native: Native) -> None:
    native.driver.offer(Segment(DATA_GPA, 4, writable=True), Segment(DATA_GPA, 4))
    assert native.fault_of_pop() == "chain-order"


def test_an_empty_segment_is_a_fault(native: Native) -> None:
    native.driver.offer(Segment(DATA_GPA, 0))
    assert native.fault_of_pop() == "zero-length"


@pytest.mark.parametrize("size_bytes", [0, 8, 24, 16 * 2048])
def test_an_indirect_table_of_bad_size_is_a_fault(native: Native, size_bytes: int) -> None:
    native.driver.write_desc(0, TABLE_GPA, size_bytes, INDIRECT, 0)
    native.driver.offer_head(0)
    assert native.fault_of_pop() == "indirect-size"


def test_an_indirect_table_inside_another_is_a_fault(native: Native) -> None:
    native.memory.write(TABLE_GPA, struct.pack("<QIHH", TABLE_GPA, 16, INDIRECT, 0))
    native.driver.write_desc(0, TABLE_GPA, 16, INDIRECT, 0)
    native.driver.offer_head(0)
    assert native.fault_of_pop() == "indirect-nested"


def test_an_indirect_table_that_goes_on_in_the_ring_is_a_fault(native: Native) -> None:
    native.driver.write_desc(0, TABLE_GPA, 16, INDIRECT | NEXT, 1)
    native.driver.offer_head(0)
    assert native.fault_of_pop() == "indirect-nested"


def test_indirect_without_the_feature_is_a_fault(native: Native) -> None:
    lib.av_vring_stop(native.ring)
    assert start(native.ring, native.driver, 0) == 0
    native.driver.offer_indirect(TABLE_GPA, Segment(DATA_GPA, 4))
    assert native.fault_of_pop() == "indirect-nested"


def test_four_gigabytes_in_a_chain_are_a_fault(native: Native) -> None:
    for index in range(3):
        native.driver.write_desc(index, DATA_GPA, 2 * MIB, WRITE | NEXT, index + 1)
    native.driver.write_desc(3, DATA_GPA, 0xFFFF_FFFF, WRITE, 0)
    native.driver.offer_head(0)
    assert native.fault_of_pop() == "chain-bytes"


def test_a_chain_of_the_whole_table_is_taken(native: Native) -> None:
    segments = [Segment(DATA_GPA + 16 * i, 16) for i in range(16)]
    head = native.driver.offer(*segments)
    chain = native.pop()
    assert chain == OracleChain(head, tuple((s.gpa, 16) for s in segments), ())


def test_a_faulty_ring_stays_dead_until_it_is_started_again(native: Native) -> None:
    native.driver.offer_head(99)
    assert native.fault_of_pop() == "bad-head"
    native.driver.set_avail_idx(0)
    assert native.fault_of_pop() == "bad-head"
    lib.av_vring_stop(native.ring)
    assert native.pop() is None
    assert start(native.ring, native.driver, 0) == 0
    assert native.pop() is None
    native.driver.offer(Segment(DATA_GPA, 8))
    assert native.pop() is not None


def test_a_chain_given_back_is_taken_again(native: Native) -> None:
    native.driver.offer(Segment(DATA_GPA, 8))
    first = native.pop()
    lib.av_vring_unpop(native.ring)
    assert native.pop() == first
    assert native.pop() is None


def test_chains_are_given_back_from_the_last_to_the_first(native: Native) -> None:
    for at in range(3):
        native.driver.offer(Segment(DATA_GPA + 16 * at, 8))
    taken = [native.pop() for _ in range(3)]
    for _ in range(2):
        lib.av_vring_unpop(native.ring)
    assert [native.pop(), native.pop(), native.pop()] == [*taken[1:], None]


def test_pending_is_whether_pop_would_take_one(native: Native) -> None:
    assert not lib.av_vring_pending(native.ring)
    native.driver.offer(Segment(DATA_GPA, 8))
    assert lib.av_vring_pending(native.ring)
    assert native.pop() is not None
    assert not lib.av_vring_pending(native.ring)
    native.driver.offer_head(99)
    assert native.fault_of_pop() == "bad-head"
    lib.av_vring_stop(native.ring)
    assert not lib.av_vring_pending(native.ring)


def test_a_ring_goes_on_where_another_left_off(native: Native) -> None:
    for _ in range(21):
        head = native.driver.offer(Segment(DATA_GPA, 8, writable=True))
        assert native.pop() is not None
        lib.av_vring_push(native.ring, head, 8)
        lib.av_vring_flush(native.ring)
        native.driver.take_used()
    lib.av_vring_stop(native.ring)
    base = lib.av_vring_base(native.ring)
    assert base == 21
    native.driver.offer(Segment(DATA_GPA, 8, writable=True))
    assert start(native.ring, native.driver, 0, base=base) == 0
    chain = native.pop()
    assert chain is not None
    lib.av_vring_push(native.ring, chain.head, 4)
    lib.av_vring_flush(native.ring)
    assert native.driver.take_used() == [(chain.head, 4)]
    assert native.pop() is None


def test_a_base_past_the_index_is_refused(native: Native) -> None:
    assert start(native.ring, native.driver, 0, base=0x1_0000) == -errno.EINVAL


def test_a_stopped_ring_writes_nothing(native: Native) -> None:
    native.driver.offer(Segment(DATA_GPA, 8, writable=True))
    chain = native.pop()
    assert chain is not None
    before = native.memory.read(RING_GPA, 0x1000)
    lib.av_vring_stop(native.ring)
    lib.av_vring_push(native.ring, chain.head, 8)
    lib.av_vring_flush(native.ring)
    assert native.memory.read(RING_GPA, 0x1000) == before
    assert not native.interrupted()
