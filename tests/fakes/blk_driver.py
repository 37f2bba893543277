"""A guest's block driver: requests as virtio 1.3 section 5.2.6 has them."""

from __future__ import annotations

import struct
from typing import Protocol

from avmm.mem.guest import GuestMemory
from fakes.driver_queue import DriverQueue, Segment
from fakes.virtio_rig import DATA_GPA

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2

_SLOT_BYTES = 0x10000
_DATA_AT = 0x1000
_STATUS_AT = 0x20
_PENDING = 0xFF


class Driver(Protocol):
    """What drives the device's queues: over virtio-mmio, or over vhost-user."""

    queues: list[DriverQueue]

    def kick(self, index: int) -> None: ...
    async def used(self, index: int, count: int = 1) -> list[tuple[int, int]]: ...


class Driven(Protocol):
    """A device's memory and its driver."""

    @property
    def memory(self) -> GuestMemory: ...
    @property
    def driver(self) -> Driver: ...


class BlkDriver:
    """Places each request in a slot of its own in guest memory."""

    def __init__(self, rig: Driven) -> None:
        self.rig = rig
        self._slots = 0

    def submit(
        self,
        kind: int,
        sector: int = 0,
        data: bytes = b"",
        *,
        read_bytes: int = 0,
        queue: int = 0,
    ) -> int:
        """Offer a request without a kick; the gpa of its slot."""
        memory = self.rig.memory
        slot = DATA_GPA + self._slots % 32 * _SLOT_BYTES
        self._slots += 1
        memory.write(slot, struct.pack("<IIQ", kind, 0, sector))
        memory.write(slot + _STATUS_AT, bytes([_PENDING]))
        memory.write(slot + _DATA_AT, data)
        segments = [Segment(slot, 16)]
        if data:
            segments.append(Segment(slot + _DATA_AT, len(data)))
        if read_bytes:
            segments.append(Segment(slot + _DATA_AT, read_bytes, writable=True))
        segments.append(Segment(slot + _STATUS_AT, 1, writable=True))
        self.rig.driver.queues[queue].offer(*segments)
        return slot

    def kick(self, queue: int = 0) -> None:
        self.rig.driver.kick(queue)

    def status(self, slot: int) -> int:
        """The status byte; 0xFF while the device has not written it."""
        return self.rig.memory.read(slot + _STATUS_AT, 1)[0]

    async def request(
        self,
        kind: int,
        sector: int = 0,
        data: bytes = b"",
        *,
        read_bytes: int = 0,
        queue: int = 0,
    ) -> tuple[int, bytes]:
        """One request to its end: its status and what it read."""
        slot = self.submit(kind, sector, data, read_bytes=read_bytes, queue=queue)
        self.kick(queue)
        await self.rig.driver.used(queue)
        return self.status(slot), self.rig.memory.read(slot + _DATA_AT, read_bytes)
