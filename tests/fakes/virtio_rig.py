"""A virtio device with everything it needs but a VM: memory, interrupt, transport, driver."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from avmm.mem.guest import GuestMemory
from avmm.units import MIB
from avmm.virtio.device import VirtioDevice
from avmm.virtio.devtype import DeviceContext
from avmm.virtio.features import RING_DEFAULT, RingLayout
from avmm.virtio.home import Homes
from avmm.virtio.interrupt import Interrupts
from avmm.virtio.transport.mmio import MmioTransport
from fakes.mmio_driver import MmioDriver

MEMORY_BYTES = 4 * MIB
DATA_GPA = 0x10_0000
"""Free for a test's buffers; the driver's queues lie below."""

ring: RingLayout = RING_DEFAULT
"""What the device of a rig offers."""

D = TypeVar("D", bound=VirtioDevice)


@dataclass
class Rig(Generic[D]):
    """errors: what the device reported to its machine."""

    device: D
    transport: MmioTransport
    driver: MmioDriver
    memory: GuestMemory
    errors: list[BaseException] = field(default_factory=list)


@asynccontextmanager
async def virtio_rig(
    build: Callable[[DeviceContext], Awaitable[D]], *, io_threads: int = 0, cpus: int = 1
) -> AsyncIterator[Rig[D]]:
    """Built and taken down in the order in which the machine does it."""
    errors: list[BaseException] = []
    async with AsyncExitStack() as stack:
        irq_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        stack.callback(os.close, irq_fd)
        interrupts = Interrupts(irq_fd)
        device, memory = await built(
            build, interrupts, errors, stack, io_threads=io_threads, cpus=cpus
        )
        stack.push_async_callback(device.end)
        transport = MmioTransport(device)
        yield Rig(device, transport, MmioDriver(transport, memory, irq_fd), memory, errors)


async def built(
    build: Callable[[DeviceContext], Awaitable[D]],
    interrupts: Interrupts,
    errors: list[BaseException],
    stack: AsyncExitStack,
    *,
    io_threads: int = 0,
    cpus: int = 1,
) -> tuple[D, GuestMemory]:
    """A device with memory and homes of its own. stack: closes them, and `interrupts`."""
    memory = GuestMemory.create(MEMORY_BYTES)
    stack.callback(memory.close)
    stack.callback(interrupts.close)
    homes = Homes.create(asyncio.get_running_loop(), threads=io_threads, poll_us=50)
    stack.callback(homes.close)
    context = DeviceContext(
        id="test0",
        memory=memory,
        interrupts=interrupts,
        homes=homes,
        loop=asyncio.get_running_loop(),
        stack=stack,
        on_error=errors.append,
        ring=ring,
        cpus=cpus,
    )
    return await build(context), memory
