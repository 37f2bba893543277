"""A guest's virtio-mmio driver: walks the registers as Linux does, over a real transport."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Callable

from avmm.bus.region import Call, Deferred
from avmm.mem.guest import GuestMemory
from avmm.virtio.state import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK
from avmm.virtio.transport import mmio
from fakes.driver_queue import DriverQueue

_QUEUES_GPA = 0x10000
_HANG_S = 20


async def perform(deferred: Deferred | None) -> None:
    """What the machine's exit handling does with a register's write."""
    if deferred is None:
        return
    result = deferred.action()
    if isinstance(deferred, Call) and inspect.isawaitable(result):
        await result


class MmioDriver:
    """irq_fd: the eventfd behind the device's interrupt line, in the place of KVM's irqfd."""

    def __init__(self, transport: mmio.MmioTransport, memory: GuestMemory, irq_fd: int) -> None:
        self.transport = transport
        self.memory = memory
        self.irq_fd = irq_fd
        self.queues: list[DriverQueue] = []

    def read(self, offset: int, size: int = 4) -> int:
        return self.transport.read(offset, size)

    async def write(self, offset: int, value: int, size: int = 4) -> None:
        await perform(self.transport.write(offset, size, value))

    async def read_features(self) -> int:
        words = []
        for select in (0, 1):
            await self.write(mmio.DEVICE_FEATURES_SEL, select)
            words.append(self.read(mmio.DEVICE_FEATURES))
        return words[0] | words[1] << 32

    async def write_features(self, value: int) -> None:
        for select in (0, 1):
            await self.write(mmio.DRIVER_FEATURES_SEL, select)
            await self.write(mmio.DRIVER_FEATURES, value >> 32 * select & 0xFFFF_FFFF)

    async def negotiate(self, features: int) -> bool:
        """Reset to FEATURES_OK; whether the device accepted."""
        await self.write(mmio.STATUS, 0)
        assert self.read(mmio.STATUS) == 0
        await self.write(mmio.STATUS, ACKNOWLEDGE)
        await self.write(mmio.STATUS, ACKNOWLEDGE | DRIVER)
        await self.write_features(features)
        await self.write(mmio.STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        return bool(self.read(mmio.STATUS) & FEATURES_OK)

    async def set_up_queue(self, index: int, queue: DriverQueue, *, ready: bool = True) -> None:
        await self.write(mmio.QUEUE_SEL, index)
        await self.write(mmio.QUEUE_SIZE, queue.size)
        for low, gpa in (
            (mmio.QUEUE_DESC_LOW, queue.desc_gpa),
            (mmio.QUEUE_DRIVER_LOW, queue.driver_gpa),
            (mmio.QUEUE_DEVICE_LOW, queue.device_gpa),
        ):
            await self.write(low, gpa & 0xFFFF_FFFF)
            await self.write(low + 4, gpa >> 32)
        if ready:
            await self.write(mmio.QUEUE_READY, 1)

    async def start(self, features: int | None = None, *, size: int = 64) -> None:
        """From reset to DRIVER_OK, with all the device's queues.

        features: to accept; all that are offered when None. size: of a queue, if it may be.
        """
        accepted = await self.read_features() if features is None else features
        assert await self.negotiate(accepted)
        self.queues = []
        gpa = _QUEUES_GPA
        while True:
            index = len(self.queues)
            await self.write(mmio.QUEUE_SEL, index)
            size_max = self.read(mmio.QUEUE_SIZE_MAX)
            if size_max == 0:
                break
            entries = min(size, size_max)
            queue = DriverQueue(self.memory, gpa, entries, event_idx=bool(accepted >> 29 & 1))
            await self.set_up_queue(index, queue)
            self.queues.append(queue)
            gpa = (queue.end_gpa + 0xFFF) & ~0xFFF
        status = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
        await self.write(mmio.STATUS, status)

    def kick(self, index: int) -> None:
        """Write QueueNotify, which KVM turns into the eventfd of that value."""
        fds = {value: fd for _, value, fd in self.transport.kick_registrations()}
        os.eventfd_write(fds[index], 1)

    async def interrupted(self) -> int:
        """Wait for the interrupt line's next edge, acknowledge it; the status."""
        async with asyncio.timeout(_HANG_S):
            await readable(self.irq_fd)
        os.eventfd_read(self.irq_fd)
        status = self.read(mmio.INTERRUPT_STATUS)
        await self.write(mmio.INTERRUPT_ACK, status)
        return status

    async def used(self, index: int, count: int = 1) -> list[tuple[int, int]]:
        """Wait until `count` chains of a queue came back: (head, bytes written) of each."""
        taken = self.queues[index].take_used()
        while len(taken) < count:
            await self.interrupted()
            taken += self.queues[index].take_used()
        return taken


async def readable(fd: int) -> None:
    """Wait until `fd` is readable."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)


async def eventually(condition: Callable[[], bool]) -> None:
    """Let the loop run until `condition` holds, which another thread may bring about."""
    async with asyncio.timeout(_HANG_S):
        while not condition():  # noqa: ASYNC110 - the other thread knows no Event
            await asyncio.sleep(0)


async def settle() -> None:
    """Let the loop take up every event that is already there."""
    for _ in range(10):
        await asyncio.sleep(0)
