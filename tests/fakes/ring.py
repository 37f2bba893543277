"""The device's side of a split virtqueue in plain Python, straight from virtio 1.3 section 2.7.

The oracle for native/vring.c: slow, without caches or barriers, one step of the text at a time.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from avmm.mem.guest import GuestMemory
from fakes.driver_queue import INDIRECT, NEXT, NO_INTERRUPT, WRITE

_DESC = struct.Struct("<QIHH")


@dataclass(frozen=True, slots=True)
class OracleChain:
    """head, and (gpa, bytes) of the readable and of the writable segments."""

    head: int
    readable: tuple[tuple[int, int], ...]
    writable: tuple[tuple[int, int], ...]


class OracleRing:
    """Same steps as the native ring: pop, push, flush, kicks on and off."""

    def __init__(
        self, memory: GuestMemory, desc: int, driver: int, device: int, size: int, event_idx: bool
    ) -> None:
        self.memory = memory
        self.desc, self.driver, self.device = desc, driver, device
        self.size = size
        self.event_idx = event_idx
        self.next_avail = self.next_used = self.published = 0

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
                return OracleChain(head, tuple(readable), tuple(writable))
            index = after

    def push(self, head: int, written: int) -> None:
        """2.7.8: an element of the used ring."""
        at = self.device + 4 + 8 * (self.next_used % self.size)
        self.memory.write(at, struct.pack("<II", head, written))
        self.next_used = (self.next_used + 1) % 65536

    def flush(self) -> bool:
        """2.7.8 and 2.7.7.2: move idx; whether the driver is to be interrupted."""
        old, new = self.published, self.next_used
        if old == new:
            return False
        self.put_u16(self.device + 2, new)
        self.published = new
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
