"""A guest with ports, and messages that it sends and receives as it likes."""

from __future__ import annotations

import struct

from avmm.virtio.devices.ports import CONTROL_RX, CONTROL_TX, PortsDevice
from avmm.virtio.devices.ports_control import Event
from fakes.driver_queue import Segment
from fakes.virtio_rig import DATA_GPA, Rig

RX, TX = 4, 5  # of port 1
CONTROL_GPA = 0x20_0000
MESSAGES_GPA = 0x21_0000
MESSAGE_BYTES = 64


class PortsGuest:
    """A guest's driver for ports, on a rig."""

    def __init__(self, rig: Rig[PortsDevice]) -> None:
        self.rig = rig
        self._free: list[int] = []

    @property
    def device(self) -> PortsDevice:
        return self.rig.device

    async def start(self, *, messages: int = 16) -> None:
        """Up to the queues; room for so many messages."""
        await self.rig.driver.start()
        self.heads: dict[int, int] = {}
        for index in range(messages):
            self._give_room(MESSAGES_GPA + MESSAGE_BYTES * index)

    def _give_room(self, at: int) -> None:
        queue = self.rig.driver.queues[CONTROL_RX]
        self.heads[queue.offer(Segment(at, MESSAGE_BYTES, writable=True))] = at
        self.rig.driver.kick(CONTROL_RX)

    async def says(self, id: int, event: int, value: int) -> None:
        await self.sends(struct.pack("<IHH", id, event, value))

    async def sends(self, data: bytes) -> None:
        """Any bytes as a message; returns when the device has taken them."""
        self.rig.memory.write(CONTROL_GPA, data)
        self.rig.driver.queues[CONTROL_TX].offer(Segment(CONTROL_GPA, len(data)))
        self.rig.driver.kick(CONTROL_TX)
        await self.rig.driver.used(CONTROL_TX)

    async def hears(self, count: int = 1) -> list[bytes]:
        """That many messages of the device."""
        found = []
        for head, written in await self.rig.driver.used(CONTROL_RX, count):
            at = self.heads.pop(head)
            found.append(self.rig.memory.read(at, written))
            self._give_room(at)
        return found

    def heard(self) -> list[bytes]:
        """The messages that are there now."""
        found = []
        for head, written in self.rig.driver.queues[CONTROL_RX].take_used():
            at = self.heads.pop(head)
            found.append(self.rig.memory.read(at, written))
        return found

    async def is_ready(self) -> None:
        """As Linux does, until it knows the names of its ports."""
        await self.says(0, Event.DEVICE_READY, 1)
        ports = len(self.device.ports)
        for message in await self.hears(ports):
            await self.says(struct.unpack("<I", message[:4])[0], Event.PORT_READY, 1)
        await self.hears(ports)

    def writes(self, data: bytes, queue: int = TX, at: int = DATA_GPA) -> None:
        self.rig.memory.write(at, data)
        self.rig.driver.queues[queue].offer(Segment(at, len(data)))
        self.rig.driver.kick(queue)

    def offers(self, size_bytes: int, queue: int = RX, at: int = DATA_GPA) -> int:
        head = self.rig.driver.queues[queue].offer(Segment(at, size_bytes, writable=True))
        self.rig.driver.kick(queue)
        return head
