"""A guest's virtio-mmio driver: walks the registers as Linux does, over a real transport."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Callable

from avmm.bus.region import Call, Deferred
from avmm.mem.guest import GuestMemory
from avmm.virtio.transport import mmio
from fakes.driver import VirtioDriver
from fakes.driver_queue import DriverQueue

_HANG_S = 20


async def perform(deferred: Deferred | None) -> None:
    """What the machine's exit handling does with a register's write."""
    if deferred is None:
        return
    result = deferred.action()
    if isinstance(deferred, Call):
        if inspect.isawaitable(result):
            await result
        if deferred.after is not None:
            deferred.after()


class MmioDriver(VirtioDriver):
    """irq_fd: the eventfd behind the device's interrupt line, in the place of KVM's irqfd."""

    def __init__(self, transport: mmio.MmioTransport, memory: GuestMemory, irq_fd: int) -> None:
        super().__init__(memory)
        self.transport = transport
        self.irq_fd = irq_fd

    def read(self, offset: int, size: int = 4) -> int:
        return self.transport.read(offset, size)

    async def write(self, offset: int, value: int, size: int = 4) -> None:
        await perform(self.transport.write(offset, size, value))

    async def probe(self) -> None:
        """They are where the ACPI tables say."""

    def status(self) -> int:
        return self.read(mmio.STATUS)

    async def set_status(self, value: int) -> None:
        await self.write(mmio.STATUS, value)

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

    async def queue_size_max(self, index: int) -> int:
        await self.write(mmio.QUEUE_SEL, index)
        return self.read(mmio.QUEUE_SIZE_MAX)

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

    def kick(self, index: int) -> None:
        """Write QueueNotify, which KVM turns into the eventfd of that value."""
        fds = {value: fd for _, value, fd in self.transport.kick_registrations()}
        os.eventfd_write(fds[index], 1)

    async def interrupted(self) -> int:
        """Wait for the interrupt line's next edge, acknowledge it; the status."""
        async with asyncio.timeout(_HANG_S):
            await readable(self.irq_fd)
        return await self.take_interrupts()

    async def take_interrupts(self) -> int:
        try:
            os.eventfd_read(self.irq_fd)
        except BlockingIOError:
            return 0
        status = self.read(mmio.INTERRUPT_STATUS)
        await self.write(mmio.INTERRUPT_ACK, status)
        return status

    def read_config(self, offset: int, size: int) -> int:
        return self.read(mmio.CONFIG + offset, size)

    async def write_config(self, offset: int, size: int, value: int) -> None:
        await self.write(mmio.CONFIG + offset, value, size)

    def config_generation(self) -> int:
        return self.read(mmio.CONFIG_GENERATION)


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
