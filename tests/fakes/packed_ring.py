"""The device's side of a packed virtqueue in plain Python, straight from virtio 1.3 section 2.8.

The oracle for native/vring_packed.c: slow, without caches or barriers, one step of the text at a
time.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from fakes.driver_queue import (
    AVAIL,
    EVENT_DESC,
    EVENT_DISABLE,
    EVENT_ENABLE,
    INDIRECT,
    NEXT,
    USED,
    WRITE,
    DriverQueue,
)
from fakes.ring import OracleChain, OracleUse, in_batches

_DESC = struct.Struct("<QIHH")


@dataclass
class Place:
    """A position in the ring, with the wrap counter that it has there (2.8.1)."""

    size: int
    offset: int = 0
    wrap: bool = True

    def forwards(self, count: int) -> list[tuple[int, bool]]:
        """Move by `count` descriptors; the places that were passed."""
        passed = []
        for _ in range(count):
            passed.append((self.offset, self.wrap))
            self.offset += 1
            if self.offset == self.size:
                self.offset, self.wrap = 0, not self.wrap
        return passed


class PackedOracleRing:
    """Same steps as the native ring: pop, unpop, push, flush, kicks on and off."""

    def __init__(self, driver: DriverQueue) -> None:
        self.memory = driver.memory
        self.desc, self.driver, self.device = driver.desc_gpa, driver.driver_gpa, driver.device_gpa
        self.size = driver.size
        self.event_idx, self.in_order = driver.event_idx, driver.in_order
        self.avail, self.used = Place(self.size), Place(self.size)
        self.taken: list[tuple[int, int, bool]] = []
        self.in_flight: dict[int, tuple[int, int]] = {}
        self.uses: list[OracleUse] = []
        self.shown: list[tuple[int, bool]] = []

    def entry(self, gpa: int) -> tuple[int, int, int, int]:
        gpa, length, id, flags = _DESC.unpack(self.memory.read(gpa, _DESC.size))
        return gpa, length, id, flags

    def pending(self) -> bool:
        """2.8.1: whether the next descriptor is available."""
        *_, flags = self.entry(self.desc + 16 * self.avail.offset)
        return bool(flags & AVAIL) == self.avail.wrap and bool(flags & USED) != self.avail.wrap

    def pop(self) -> OracleChain | None:
        """2.8.5 to 2.8.7: the next chain, or the table it names."""
        if not self.pending():
            return None
        before = self.avail.offset, self.avail.wrap
        entries = []
        while True:
            [(offset, _)] = self.avail.forwards(1)
            entries.append(self.entry(self.desc + 16 * offset))
            if not entries[-1][3] & NEXT:
                break
        id, descs = entries[-1][2], len(entries)
        if entries[0][3] & INDIRECT:
            table, length = entries[0][:2]
            entries = [self.entry(at) for at in range(table, table + length, 16)]
        chain = OracleChain(
            id,
            tuple((gpa, length) for gpa, length, _, flags in entries if not flags & WRITE),
            tuple((gpa, length) for gpa, length, _, flags in entries if flags & WRITE),
        )
        self.taken.append((id, *before))
        self.in_flight[id] = descs, chain.writable_bytes
        return chain

    def unpop(self) -> None:
        """As if the chain had not been taken."""
        id, self.avail.offset, self.avail.wrap = self.taken.pop()
        del self.in_flight[id]

    def push(self, id: int, written: int) -> None:
        """A buffer used; nothing to see before the next flush."""
        descs, writable_bytes = self.in_flight.pop(id)
        self.uses.append(OracleUse(id, written, written == writable_bytes, descs))

    def show(self) -> None:
        """2.8.6 and 2.8.8: a used descriptor for each chain or batch, skipping what it took."""
        for batch in in_batches(self.uses, self.in_order):
            at = self.desc + 16 * self.used.offset
            flags = (AVAIL | USED if self.used.wrap else 0) | (WRITE if batch[-1].written else 0)
            self.memory.write(at + 8, struct.pack("<IHH", batch[-1].written, batch[-1].head, flags))
            self.shown += self.used.forwards(sum(use.descs for use in batch))
        self.uses = []

    def flush(self) -> bool:
        """2.8.14: also whether the driver is to be interrupted, for all since the last flush."""
        self.show()
        passed, self.shown = self.shown, []
        event, flags = struct.unpack("<HH", self.memory.read(self.driver, 4))
        if not passed or flags == EVENT_DISABLE:
            return False
        if flags == EVENT_DESC and self.event_idx:
            return (event & 0x7FFF, bool(event >> 15)) in passed
        return True

    def kicks_on(self) -> bool:
        """2.8.14: want the next notification; whether something came meanwhile."""
        if self.event_idx:
            self.put_event(self.avail.offset | self.avail.wrap << 15, EVENT_DESC)
        else:
            self.put_event(0, EVENT_ENABLE)
        return self.pending()

    def kicks_off(self) -> None:
        """2.8.14: want none."""
        self.put_event(0, EVENT_DISABLE)

    def put_event(self, offset_and_wrap: int, flags: int) -> None:
        self.memory.write(self.device, struct.pack("<HH", offset_and_wrap, flags))
