"""A native ring over memory of its own, fed by a driver queue, and random histories on it."""

from __future__ import annotations

import errno
import functools
import os
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import pytest

from avmm.mem.guest import GuestMemory
from avmm.native import CData, ffi, lib
from avmm.units import MIB
from avmm.virtio import features
from fakes.driver_queue import AVAIL, USED, DriverQueue, Segment, driver_queue
from fakes.ring import OracleChain

RING_GPA = 0x10000
TABLE_GPA = 0x80000
DATA_GPA = 0x100000
MEMORY_BYTES = 4 * MIB
IOV_MAX = 1024


class Oracle(Protocol):
    """The steps of a ring."""

    def pop(self) -> OracleChain | None: ...
    def unpop(self) -> None: ...
    def push(self, head: int, written: int, /) -> None: ...
    def show(self) -> None: ...
    def flush(self) -> bool: ...
    def kicks_on(self) -> bool: ...
    def kicks_off(self) -> None: ...


@dataclass
class NativeRing:
    """negotiated: the features it was started with first."""

    memory: GuestMemory
    driver: DriverQueue
    ring: CData
    irq_fd: int
    negotiated: int

    def start(self, negotiated: int | None = None, *, base: int | None = None) -> int:
        """Start it where the driver queue says."""
        queue = self.driver
        return self.start_at(
            queue.size,
            (queue.desc_gpa, queue.driver_gpa, queue.device_gpa),
            self.negotiated if negotiated is None else negotiated,
            base,
        )

    def start_at(
        self, size: int, gpas: tuple[int, int, int], negotiated: int, base: int | None = None
    ) -> int:
        """Start it anywhere."""
        setup = ffi.new("struct av_vring_setup *")
        setup.desc_gpa, setup.driver_gpa, setup.device_gpa = gpas
        setup.size, setup.features = size, negotiated
        if base is not None:
            setup.resume, setup.base = True, base
        return lib.av_vring_start(self.ring, setup)

    def stop(self) -> int:
        """Stop it; its base."""
        lib.av_vring_stop(self.ring)
        return lib.av_vring_base(self.ring)

    def pop(self) -> OracleChain | None:
        chain, iov = ffi.new("struct av_chain *"), ffi.new("struct iovec[]", IOV_MAX)
        result = lib.av_vring_pop(self.ring, chain, iov, IOV_MAX)
        if result < 0:
            raise OSError(-result, self.fault)
        if not result:
            return None
        parts = [self._segment(iov[i]) for i in range(chain.readable + chain.writable)]
        readable, writable = parts[: chain.readable], parts[chain.readable :]
        assert chain.readable_bytes == sum(size for _, size in readable)
        assert chain.writable_bytes == sum(size for _, size in writable)
        return OracleChain(chain.head, tuple(readable), tuple(writable))

    def take(self) -> OracleChain:
        """Pop a chain that has to be there."""
        chain = self.pop()
        assert chain is not None
        return chain

    def unpop(self) -> None:
        lib.av_vring_unpop(self.ring)

    def push(self, head: int, written: int, /) -> None:
        lib.av_vring_push(self.ring, head, written)

    def show(self) -> None:
        lib.av_vring_show(self.ring)

    def flush(self) -> bool:
        """Whether the driver was interrupted."""
        lib.av_vring_flush(self.ring)
        return self.interrupted()

    def use(self, written: int = 0) -> int:
        """Pop a chain that has to be there, and give it back; its head."""
        head = self.take().head
        self.push(head, written)
        lib.av_vring_flush(self.ring)
        return head

    def kicks_on(self) -> bool:
        return bool(lib.av_vring_kicks_on(self.ring))

    def kicks_off(self) -> None:
        lib.av_vring_kicks_off(self.ring)

    @property
    def pending(self) -> bool:
        return bool(lib.av_vring_pending(self.ring))

    @property
    def fault(self) -> str:
        return bytes(ffi.string(lib.av_fault_name(lib.av_vring_fault(self.ring)))).decode()

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

    def statistics(self) -> CData:
        stats = ffi.new("struct av_vring_stats *")
        lib.av_vring_statistics(self.ring, stats)
        return stats

    def _segment(self, iov: CData) -> tuple[int, int]:
        hva = int(ffi.cast("uintptr_t", iov.iov_base))
        [region] = [r for r in self.memory.regions if r.hva <= hva < r.hva + r.size_bytes]
        return hva - region.hva + region.gpa, int(iov.iov_len)


@contextmanager
def native_ring(size: int, negotiated: int) -> Iterator[NativeRing]:
    """A running ring; INDIRECT_DESC is always negotiated."""
    negotiated |= features.RING_INDIRECT_DESC
    memory = GuestMemory.create(MEMORY_BYTES)
    irq_fd = os.eventfd(0, os.EFD_NONBLOCK)
    interrupt = lib.av_interrupt_create(irq_fd)
    ring = lib.av_vring_create(memory.native, interrupt)
    driver = driver_queue(memory, RING_GPA, size, negotiated)
    native = NativeRing(memory, driver, ring, irq_fd, negotiated)
    assert native.start() == 0
    yield native
    lib.av_vring_destroy(ring)
    lib.av_interrupt_destroy(interrupt)
    os.close(irq_fd)
    memory.close()


def play_histories(
    oracle: Callable[[DriverQueue], Oracle], size: int, negotiated: int, *, seeds: int, steps: int
) -> None:
    """Random histories on the native ring and on the oracle, with equal memories all the time."""
    for seed in range(seeds):
        with native_ring(size, negotiated) as native:
            memory = GuestMemory.create(MEMORY_BYTES)
            driver = driver_queue(memory, RING_GPA, size, native.negotiated)
            _History(native, oracle(driver), driver, seed).play(steps)
            memory.close()


class _History:
    """free: descriptors; popped: all heads in the order in which they were taken."""

    def __init__(self, native: NativeRing, oracle: Oracle, driver: DriverQueue, seed: int) -> None:
        self.native, self.oracle, self.driver = native, oracle, driver
        self.in_order = driver.in_order
        self.rng = random.Random(seed)
        self.popped: list[OracleChain] = []
        self.taken: list[OracleChain] = []
        self.offered = 0
        self.free = driver.size
        self.costs: dict[int, int] = {}

    def play(self, steps: int) -> None:
        step = (self.offer, self.offer, self.pop, self.pop, self.unpop, self.use, self.suppress)
        for _ in range(steps):
            self.rng.choice(step)()
            assert self.ring_area(self.native.memory) == self.ring_area(self.driver.memory)

    def ring_area(self, memory: GuestMemory) -> bytes:
        return memory.read(RING_GPA, self.driver.end_gpa - RING_GPA)

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
        self.costs[head] = cost
        self.free -= cost

    def pop(self) -> None:
        chain = self.native.pop()
        assert chain == self.oracle.pop()
        if chain is not None:
            self.taken.append(chain)
            self.popped.append(chain)

    def unpop(self) -> None:
        """As often as the chain taken last was not given back."""
        while self.popped and self.popped[-1] in self.taken and self.rng.random() < 0.3:
            self.taken.remove(self.popped.pop())
            self.native.unpop()
            self.oracle.unpop()

    def use(self) -> None:
        if not self.in_order:
            self.rng.shuffle(self.taken)
        for _ in range(self.rng.randint(0, len(self.taken))):
            chain = self.taken.pop(0)
            whole = self.rng.random() < 0.6
            written = chain.writable_bytes if whole else self.rng.randrange(1 << 16)
            self.native.push(chain.head, written)
            self.oracle.push(chain.head, written)
            if self.rng.random() < 0.2:
                self.native.show()
                self.oracle.show()
        assert self.native.flush() == self.oracle.flush()
        if self.rng.random() < 0.5:
            used = self.native.driver.take_used()
            assert used == self.driver.take_used()
            self.free += sum(self.costs[head] for head, _ in used)

    def suppress(self) -> None:
        if self.rng.random() < 0.5:
            self.native.kicks_off()
            self.oracle.kicks_off()
        else:
            assert self.native.kicks_on() == self.oracle.kicks_on()


def random_segments(rng: random.Random, at_most: int) -> list[Segment]:
    """Readable and writable pieces of the data area, `at_most` of each; at least one."""
    readable, writable = rng.randint(0, at_most), rng.randint(0, at_most)
    count = max(1, readable + writable)
    return [
        Segment(DATA_GPA + rng.randrange(0x1000), rng.randint(1, 5000), writable=i >= readable)
        for i in range(count)
    ]


def play_garbage(size: int, negotiated: int, *, seeds: int, steps: int) -> set[str]:
    """Rings that a driver fills at random, with some sense and with none. What is taken lies in
    memory, as pop() checks, and a restart always helps; the kinds of faults that were met."""
    faults: set[str] = set()
    for seed in range(seeds):
        rng = random.Random(seed)
        with native_ring(size, negotiated) as native:
            taken: list[int] = []
            for _ in range(steps):
                _scribble(native, rng)
                try:
                    chain = native.pop()
                except OSError as e:
                    faults.add(str(e.strerror))
                    native.stop()
                    assert native.start() == 0
                    taken = []
                    continue
                if chain is not None:
                    taken.append(chain.head)
                if taken and rng.random() < 0.5:
                    native.push(taken.pop(0), rng.getrandbits(32))
                    native.flush()
    return faults


def _scribble(native: NativeRing, rng: random.Random) -> None:
    """A descriptor of the ring or of a table; and for a split ring a head made available."""
    driver, packed = native.driver, bool(native.negotiated & features.RING_PACKED)
    gpa = rng.choice((DATA_GPA, TABLE_GPA, MEMORY_BYTES - 8, rng.getrandbits(64)))
    length = rng.choice((16, 32, 48, 1000, 0, rng.getrandbits(32)))
    other = rng.randrange(driver.size + 1)  # next, or id
    flags = rng.randrange(8) | (rng.choice((AVAIL, USED)) if packed else 0)
    entry = struct.pack("<QIHH", gpa, length, *((other, flags) if packed else (flags, other)))
    place = rng.choice((driver.desc_gpa, driver.desc_gpa, TABLE_GPA))
    native.memory.write(place + 16 * rng.randrange(driver.size), entry)
    if not packed and rng.random() < 0.5:
        jump = rng.choice((0, 0, 0, driver.size + 1))
        driver.set_avail_idx(native.statistics().next_avail + jump)
        driver.offer_head(rng.randrange(driver.size + 1))
