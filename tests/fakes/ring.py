"""The device's side of a split virtqueue in plain Python, straight from virtio 1.3 section 2.7.

The oracle for native/vring_split.c: slow, without caches or barriers, one step of the text at a
time.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from fakes.driver_queue import INDIRECT, NEXT, NO_INTERRUPT, WRITE, DriverQueue

_DESC = struct.Struct("<QIHH")


@dataclass(frozen=True, slots=True)
class OracleChain:
    """head, or the id of a packed ring, and (gpa, bytes) of the readable and of the writable
    segments."""

    head: int
    readable: tuple[tuple[int, int], ...]
    writable: tuple[tuple[int, int], ...]

    @property
    def writable_bytes(self) -> int:
        return sum(size_bytes for _, size_bytes in self.writable)


@dataclass(frozen=True, slots=True)
class OracleUse:
    """A chain given back; descs: how many descriptors it took of a packed ring."""

    head: int
    written: int
    whole: bool
    descs: int = 1


def in_batches(uses: list[OracleUse], in_order: bool) -> list[list[OracleUse]]:
    """2.7.9, 2.8.8: what one used element may speak for. All but the last of a batch are known to
    the driver only as written wholly."""
    batches: list[list[OracleUse]] = []
    for use in uses:
        if in_order and batches and batches[-1][-1].whole:
            batches[-1].append(use)
        else:
            batches.append([use])
    return batches


class OracleRing:
    """Same steps as the native ring: pop, unpop, push, flush, kicks on and off."""

    def __init__(self, driver: DriverQueue) -> None:
        self.memory = driver.memory
        self.desc, self.driver, self.device = driver.desc_gpa, driver.driver_gpa, driver.device_gpa
        self.size = driver.size
        self.event_idx, self.in_order = driver.event_idx, driver.in_order
        self.next_avail = self.next_used = self.flushed = 0
        self.room: dict[int, int] = {}
        self.uses: list[OracleUse] = []

    def u16(self, gpa: int) -> int:
        return int.from_bytes(self.memory.read(gpa, 2), "little")

    def put_u16(self, gpa: int, value: int) -> None:
        self.memory.write(gpa, struct.pack("<H", value))

    def avail_idx(self) -> int:
        return self.u16(self.driver + 2)

    def pop(self) -> OracleChain | None:
        """2.7.13: the next entry of the available ring, followed through its descriptors."""
        if self.avail_idx() == self.next_avail:
            return None
        head = self.u16(self.driver + 4 + 2 * (self.next_avail % self.size))
        self.next_avail = (self.next_avail + 1) % 65536
        table, index = self.desc, head
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        while True:
            gpa, length, flags, after = _DESC.unpack(self.memory.read(table + 16 * index, 16))
            if flags & INDIRECT:
                table, index = gpa, 0
                continue
            (writable if flags & WRITE else readable).append((gpa, length))
            if not flags & NEXT:
                break
            index = after
        chain = OracleChain(head, tuple(readable), tuple(writable))
        self.room[head] = chain.writable_bytes
        return chain

    def unpop(self) -> None:
        """As if the chain had not been taken."""
        self.next_avail = (self.next_avail - 1) % 65536

    def push(self, head: int, written: int) -> None:
        """A buffer used; nothing to see before the next flush."""
        self.uses.append(OracleUse(head, written, written == self.room[head]))

    def show(self) -> None:
        """2.7.8: elements, then idx."""
        for batch in in_batches(self.uses, self.in_order):
            at = self.device + 4 + 8 * (self.next_used % self.size)
            self.memory.write(at, struct.pack("<II", batch[-1].head, batch[-1].written))
            self.next_used = (self.next_used + len(batch)) % 65536
        self.uses = []
        self.put_u16(self.device + 2, self.next_used)

    def flush(self) -> bool:
        """2.7.7.2: also whether the driver is to be interrupted, for all since the last flush."""
        self.show()
        old, new = self.flushed, self.next_used
        self.flushed = new
        if old == new:
            return False
        if not self.event_idx:
            return not self.u16(self.driver) & NO_INTERRUPT
        used_event = self.u16(self.driver + 4 + 2 * self.size)
        # Interrupt if the index passed used_event: it is one of old .. new - 1.
        return (used_event - old) % 65536 < (new - old) % 65536

    def kicks_on(self) -> bool:
        """2.7.10: want the next notification; whether something came meanwhile."""
        if self.event_idx:
            self.put_u16(self.device + 4 + 8 * self.size, self.next_avail)
        else:
            self.put_u16(self.device, 0)
        return self.avail_idx() != self.next_avail

    def kicks_off(self) -> None:
        """2.7.10: want none; with EVENT_IDX by leaving avail_event behind."""
        if not self.event_idx:
            self.put_u16(self.device, 1)
