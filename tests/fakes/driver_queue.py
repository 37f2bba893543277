"""The driver's side of a virtqueue, split or packed, in plain Python over guest memory (virtio 1.3,
2.7 and 2.8)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from avmm.mem.guest import GuestMemory
from avmm.virtio import features

NEXT, WRITE, INDIRECT = 1, 2, 4
NO_INTERRUPT = 1
AVAIL, USED = 1 << 7, 1 << 15
EVENT_ENABLE, EVENT_DISABLE, EVENT_DESC = 0, 1, 2
_DESC = struct.Struct("<QIHH")
_PACKED = struct.Struct("<QIHH")  # gpa, length, id, flags
_USED = struct.Struct("<II")


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a buffer: for the device to write, or to read."""

    gpa: int
    size_bytes: int
    writable: bool = False


@dataclass(frozen=True, slots=True)
class _Chain:
    """In flight: descriptors it takes of the ring, what is free again after it, its room."""

    descs: int = 1
    free: tuple[int, ...] = ()
    writable_bytes: int = 0


class DriverQueue:
    """A split queue: descriptor table, available and used ring, one after the other from `gpa` on.

    A chain is known by the index of its head. in_order: the device may speak for a batch by its
    last buffer.
    """

    def __init__(
        self,
        memory: GuestMemory,
        gpa: int,
        size: int,
        *,
        event_idx: bool = True,
        in_order: bool = False,
    ) -> None:
        self.memory = memory
        self.size = size
        self.event_idx = event_idx
        self.in_order = in_order
        self.desc_gpa = gpa
        self._free = list(range(size))
        self._in_flight: dict[int, _Chain] = {}
        self._used_idx = 0
        self._place()
        memory.write(gpa, bytes(self.end_gpa - gpa))

    def _place(self) -> None:
        self.driver_gpa = self.desc_gpa + 16 * self.size
        self.device_gpa = (self.driver_gpa + 2 * self.size + 6 + 3) & ~3
        self.end_gpa = self.device_gpa + 8 * self.size + 6
        self._avail_idx = 0

    @property
    def base(self) -> int:
        """Where the device stands when all that it took is taken back, as vhost-user says it."""
        return self._used_idx

    def write_desc(self, index: int, gpa: int, size_bytes: int, flags: int, next: int) -> None:
        """Fill a descriptor, with whatever a hostile driver likes."""
        self.memory.write(self.desc_gpa + 16 * index, _DESC.pack(gpa, size_bytes, flags, next))

    def offer(self, *segments: Segment) -> int:
        """Make a chain of the segments available; its head."""
        taken = [self._free.pop(0) for _ in segments]
        for at, (index, segment) in enumerate(zip(taken, segments, strict=True)):
            last = at == len(taken) - 1
            flags = _write(segment) | (0 if last else NEXT)
            after = 0 if last else taken[at + 1]
            self.write_desc(index, segment.gpa, segment.size_bytes, flags, after)
        self._in_flight[taken[0]] = _Chain(len(taken), tuple(taken), _writable(segments))
        self.offer_head(taken[0])
        return taken[0]

    def offer_indirect(self, table_gpa: int, *segments: Segment) -> int:
        """The same through a table of its own at `table_gpa`."""
        for at, segment in enumerate(segments):
            last = at == len(segments) - 1
            flags = _write(segment) | (0 if last else NEXT)
            entry = _DESC.pack(segment.gpa, segment.size_bytes, flags, 0 if last else at + 1)
            self.memory.write(table_gpa + 16 * at, entry)
        head = self._free.pop(0)
        self.write_desc(head, table_gpa, 16 * len(segments), INDIRECT, 0)
        self._in_flight[head] = _Chain(1, (head,), _writable(segments))
        self.offer_head(head)
        return head

    def offer_broken(self) -> str:
        """Offer what no device can use; the kind of the fault."""
        self.offer_head(self.size)
        return "bad-head"

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
        """(head or id, bytes written) of each chain given back since the last call."""
        taken = self._take_shown()
        self._ask()
        # What the device showed before it could see that question comes without an interrupt.
        while more := self._take_shown():
            taken += more
            self._ask()
        return taken

    def _take_shown(self) -> list[tuple[int, int]]:
        taken: list[tuple[int, int]] = []
        while self._used_idx != self._read_u16(self.device_gpa + 2):
            at = self.device_gpa + 4 + 8 * (self._used_idx % self.size)
            batch, _ = self._take_batch(*_USED.unpack(self.memory.read(at, 8)))
            self._used_idx = (self._used_idx + len(batch)) & 0xFFFF
            taken += batch
        return taken

    def _take_batch(self, last: int, written: int) -> tuple[list[tuple[int, int]], int]:
        """What one used element speaks for, and how many descriptors that took; buffers before the
        last are written wholly (2.7.9, 2.8.8)."""
        batch: list[tuple[int, int]] = []
        descs = 0
        for head in list(self._in_flight) if self.in_order else [last]:
            chain = self._in_flight.pop(head, _Chain())
            self._free.extend(chain.free)
            descs += chain.descs
            if head == last:
                break
            batch.append((head, chain.writable_bytes))
        return [*batch, (last, written)], descs

    def _ask(self) -> None:
        if self.event_idx:  # used_event: interrupt for the very next one
            self.memory.write(
                self.driver_gpa + 4 + 2 * self.size, struct.pack("<H", self._used_idx)
            )

    def _read_u16(self, gpa: int) -> int:
        return int.from_bytes(self.memory.read(gpa, 2), "little")


class PackedDriverQueue(DriverQueue):
    """A packed queue: descriptor ring, then both event suppression structures.

    A chain is known by its buffer id. The attributes are a hostile driver's to change.
    """

    def _place(self) -> None:
        self.driver_gpa = self.desc_gpa + 16 * self.size
        self.device_gpa = self.driver_gpa + 4
        self.end_gpa = self.device_gpa + 4
        self.next, self.wrap = 0, True
        self._used_wrap = True
        self.room = self.size

    @property
    def base(self) -> int:
        place = self._used_idx | self._used_wrap << 15
        return place | place << 16

    def offer(self, *segments: Segment) -> int:
        """Make a chain of the segments available; its buffer id."""
        entries = [(s.gpa, s.size_bytes, _write(s) | NEXT) for s in segments]
        gpa, size_bytes, flags = entries[-1]
        entries[-1] = gpa, size_bytes, flags & ~NEXT
        return self._offer(entries, _writable(segments))

    def offer_indirect(self, table_gpa: int, *segments: Segment) -> int:
        """The same through a table of its own at `table_gpa` (2.8.7)."""
        table = (_PACKED.pack(s.gpa, s.size_bytes, 0, _write(s)) for s in segments)
        self.memory.write(table_gpa, b"".join(table))
        entry = table_gpa, _PACKED.size * len(segments), INDIRECT
        return self._offer([entry], _writable(segments))

    def _offer(self, entries: list[tuple[int, int, int]], writable_bytes: int) -> int:
        id = self._free.pop(0)
        self.offer_entries(id, *entries)
        self._in_flight[id] = _Chain(len(entries), (id,), writable_bytes)
        return id

    def offer_broken(self) -> str:
        """Offer what no device can use; the kind of the fault."""
        self.offer_entries(self.size, (0, 16, 0))
        return "bad-id"

    def offer_entries(self, id: int, *entries: tuple[int, int, int]) -> None:
        """Put (gpa, bytes, flags) of each descriptor into the ring, whatever they are; the flags of
        the first come last."""
        assert len(entries) <= self.room, "a driver's own mistake"
        self.room -= len(entries)
        writes = []
        for gpa, size_bytes, flags in entries:
            at = self.desc_gpa + _PACKED.size * self.next
            flags |= AVAIL if self.wrap else USED
            writes.append((at, _PACKED.pack(gpa, size_bytes, id, flags)))
            self.next += 1
            if self.next == self.size:
                self.next, self.wrap = 0, not self.wrap
        for at, data in reversed(writes):
            self.memory.write(at, data)

    def _take_shown(self) -> list[tuple[int, int]]:
        taken: list[tuple[int, int]] = []
        while (used := self._used_descriptor()) is not None:
            batch, descs = self._take_batch(*used)
            taken += batch
            self.room += descs
            self._used_idx += descs
            if self._used_idx >= self.size:
                self._used_idx, self._used_wrap = self._used_idx - self.size, not self._used_wrap
        return taken

    def _used_descriptor(self) -> tuple[int, int] | None:
        at = self.desc_gpa + _PACKED.size * self._used_idx
        _, written, id, flags = _PACKED.unpack(self.memory.read(at, _PACKED.size))
        if bool(flags & AVAIL) != bool(flags & USED) or bool(flags & USED) != self._used_wrap:
            return None
        return id, written if flags & WRITE else 0  # 2.8.4: else the length means nothing

    def _ask(self) -> None:
        """Interrupt for the very next one (2.8.14)."""
        flags = EVENT_DESC if self.event_idx else EVENT_ENABLE
        self.write_event(self._used_idx | self._used_wrap << 15, flags)

    def write_event(self, offset_and_wrap: int, flags: int) -> None:
        """Fill the driver's event suppression structure."""
        self.memory.write(self.driver_gpa, struct.pack("<HH", offset_and_wrap, flags))


def driver_queue(memory: GuestMemory, gpa: int, size: int, negotiated: int) -> DriverQueue:
    """The queue that a driver sets up for the features it negotiated."""
    layout = PackedDriverQueue if negotiated & features.RING_PACKED else DriverQueue
    return layout(
        memory,
        gpa,
        size,
        event_idx=bool(negotiated & features.RING_EVENT_IDX),
        in_order=bool(negotiated & features.IN_ORDER),
    )


def _write(segment: Segment) -> int:
    return WRITE if segment.writable else 0


def _writable(segments: tuple[Segment, ...]) -> int:
    return sum(segment.size_bytes for segment in segments if segment.writable)
