"""The driver's side of a split virtqueue, in plain Python over guest memory (virtio 1.3, 2.7)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from avmm.mem.guest import GuestMemory

NEXT, WRITE, INDIRECT = 1, 2, 4
NO_INTERRUPT = 1
_DESC = struct.Struct("<QIHH")
_USED = struct.Struct("<II")


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a buffer: for the device to write, or to read."""

    gpa: int
    size_bytes: int
    writable: bool = False


class DriverQueue:
    """Descriptor table, available and used ring, one after the other from `gpa` on."""

    def __init__(self, memory: GuestMemory, gpa: int, size: int, *, event_idx: bool = True) -> None:
        self.memory = memory
        self.size = size
        self.event_idx = event_idx
        self.desc_gpa = gpa
        self.driver_gpa = gpa + 16 * size
        self.device_gpa = (self.driver_gpa + 2 * size + 6 + 3) & ~3
        self.end_gpa = self.device_gpa + 8 * size + 6
        self._free = list(range(size))
        self._chains: dict[int, list[int]] = {}
        self._avail_idx = 0
        self._used_idx = 0
        memory.write(gpa, bytes(self.end_gpa - gpa))

    def write_desc(self, index: int, gpa: int, size_bytes: int, flags: int, next: int) -> None:
        """Fill a descriptor, with whatever a hostile driver likes."""
        self.memory.write(self.desc_gpa + 16 * index, _DESC.pack(gpa, size_bytes, flags, next))

    def offer(self, *segments: Segment) -> int:
        """Make a chain of the segments available; its head."""
        taken = [self._free.pop(0) for _ in segments]
        for at, (index, segment) in enumerate(zip(taken, segments, strict=True)):
            last = at == len(taken) - 1
            flags = (WRITE if segment.writable else 0) | (0 if last else NEXT)
            after = 0 if last else taken[at + 1]
            self.write_desc(index, segment.gpa, segment.size_bytes, flags, after)
        self._chains[taken[0]] = taken
        self.offer_head(taken[0])
        return taken[0]

    def offer_indirect(self, table_gpa: int, *segments: Segment) -> int:
        """The same through a table of its own at `table_gpa`."""
        for at, segment in enumerate(segments):
            last = at == len(segments) - 1
            flags = (WRITE if segment.writable else 0) | (0 if last else NEXT)
            entry = _DESC.pack(segment.gpa, segment.size_bytes, flags, 0 if last else at + 1)
            self.memory.write(table_gpa + 16 * at, entry)
        head = self._free.pop(0)
        self.write_desc(head, table_gpa, 16 * len(segments), INDIRECT, 0)
        self._chains[head] = [head]
        self.offer_head(head)
        return head

    def offer_head(self, head: int) -> None:
        """Put `head` into the available ring, whatever it is."""
        at = self.driver_gpa + 4 + 2 * (self._avail_idx % self.size)
        self.memory.write(at, struct.pack("<H", head))
        self.set_avail_idx(self._avail_idx + 1)

    def set_avail_idx(self, value: int) -> None:
        """Move the available index, whatever that announces."""
        self._avail_idx = value & 0xFFFF
        self.memory.write(self.driver_gpa + 2, struct.pack("<H", self._avail_idx))

    def take_used(self) -> list[tuple[int, int]]:
        """(head, bytes written) of each chain given back since the last call."""
        taken: list[tuple[int, int]] = []
        while self._used_idx != self._read_u16(self.device_gpa + 2):
            at = self.device_gpa + 4 + 8 * (self._used_idx % self.size)
            head, written = _USED.unpack(self.memory.read(at, 8))
            self._free.extend(self._chains.pop(head, []))
            self._used_idx = (self._used_idx + 1) & 0xFFFF
            taken.append((head, written))
        if self.event_idx:  # used_event: interrupt for the very next one
            self.memory.write(
                self.driver_gpa + 4 + 2 * self.size, struct.pack("<H", self._used_idx)
            )
        return taken

    def _read_u16(self, gpa: int) -> int:
        return int.from_bytes(self.memory.read(gpa, 2), "little")
