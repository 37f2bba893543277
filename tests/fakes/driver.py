"""A guest's virtio driver, apart from the transport: initialization, queues, used buffers."""

from __future__ import annotations

from abc import ABC, abstractmethod

from avmm.mem.guest import GuestMemory
from avmm.virtio.state import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK
from fakes.driver_queue import DriverQueue, driver_queue

_QUEUES_GPA = 0x10000

refused = 0
"""Features that drivers do not accept of what is offered, unless a test says what they accept."""


class VirtioDriver(ABC):
    """Does as Linux does (virtio 1.3 section 3.1.1)."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.queues: list[DriverQueue] = []
        self.negotiated = 0

    @abstractmethod
    async def probe(self) -> None:
        """Find the registers."""

    @abstractmethod
    def status(self) -> int:
        """Read the status field."""

    @abstractmethod
    async def set_status(self, value: int) -> None:
        """Write the status field; 0 resets."""

    @abstractmethod
    async def read_features(self) -> int:
        """What the device offers."""

    @abstractmethod
    async def write_features(self, value: int) -> None:
        """What the driver accepts."""

    @abstractmethod
    async def queue_size_max(self, index: int) -> int:
        """Select a queue; 0 when it does not exist."""

    @abstractmethod
    async def set_up_queue(self, index: int, queue: DriverQueue, *, ready: bool = True) -> None:
        """Tell the device where a queue is."""

    @abstractmethod
    def kick(self, index: int) -> None:
        """Notify a queue, as KVM would pass it on."""

    @abstractmethod
    async def interrupted(self) -> int:
        """Wait for the next interrupt; what it is about: 1 used buffers, 2 configuration."""

    @abstractmethod
    async def take_interrupts(self) -> int:
        """What interrupts came since the last were taken; 0 when none did."""

    @abstractmethod
    def read_config(self, offset: int, size: int) -> int:
        """A field of the device's configuration."""

    @abstractmethod
    async def write_config(self, offset: int, size: int, value: int) -> None:
        """Likewise."""

    @abstractmethod
    def config_generation(self) -> int:
        """The version of the configuration."""

    async def negotiate(self, features: int) -> bool:
        """Reset to FEATURES_OK; whether the device accepted."""
        await self.set_status(0)
        assert self.status() == 0
        await self.set_status(ACKNOWLEDGE)
        await self.set_status(ACKNOWLEDGE | DRIVER)
        await self.write_features(features)
        self.negotiated = features
        await self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)
        return bool(self.status() & FEATURES_OK)

    def new_queue(self, gpa: int, size: int) -> DriverQueue:
        """An empty queue for the features negotiated."""
        return driver_queue(self.memory, gpa, size, self.negotiated)

    async def start(self, features: int | None = None, *, size: int = 64) -> None:
        """From reset to DRIVER_OK, with all the device's queues.

        features: to accept; all that are offered and not refused when None. size: of a queue, if it
        may be.
        """
        await self.set_up(features, size=size)
        await self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)

    async def set_up(self, features: int | None = None, *, size: int = 64) -> None:
        """The same but for DRIVER_OK."""
        accepted = await self.read_features() & ~refused if features is None else features
        assert await self.negotiate(accepted)
        self.queues = []
        gpa = _QUEUES_GPA
        while size_max := await self.queue_size_max(len(self.queues)):
            entries = min(size, size_max)
            queue = self.new_queue(gpa, entries)
            await self.set_up_queue(len(self.queues), queue)
            self.queues.append(queue)
            gpa = (queue.end_gpa + 0xFFF) & ~0xFFF

    async def used(self, index: int, count: int = 1) -> list[tuple[int, int]]:
        """Wait until `count` chains of a queue came back: (head, bytes written) of each."""
        taken = self.queues[index].take_used()
        while len(taken) < count:
            await self.interrupted()
            taken += self.queues[index].take_used()
        return taken
