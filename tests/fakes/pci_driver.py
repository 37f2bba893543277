"""A guest's virtio-pci driver: from the capability list on, as Linux does it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from avmm.mem.guest import GuestMemory
from avmm.pci import function as header
from avmm.pci import msix
from avmm.pci.root import RootComplex
from avmm.virtio.device import VirtioDevice
from avmm.virtio.devtype import DeviceContext
from avmm.virtio.interrupt import CONFIG_CHANGE, USED_BUFFER, Interrupts
from avmm.virtio.transport import pci, pci_common
from fakes.driver import VirtioDriver
from fakes.driver_queue import DriverQueue
from fakes.pci_host import ECAM, HIGH, LOW, Cpu, FakeMessages, FakeNotifications
from fakes.virtio_rig import built

_HANG_S = 20
_DATA = 0x4041
"""Of vector 0; the next ones count on."""

D = TypeVar("D", bound=VirtioDevice)


class PciDriver(VirtioDriver):
    """Of device `device` of the bus. vectors: MSI-X is switched on by start()."""

    def __init__(
        self,
        cpu: Cpu,
        memory: GuestMemory,
        messages: FakeMessages,
        notifications: FakeNotifications,
        *,
        device: int = 1,
    ) -> None:
        super().__init__(memory)
        self.cpu = cpu
        self.messages = messages
        self.notifications = notifications
        self.space = cpu.config(device)
        self.parts: dict[int, tuple[int, int]] = {}
        self.multiplier = 0
        self.vectors = 0
        self.table = 0
        self.control = 0

    def config_read(self, offset: int, size: int) -> int:
        return self.cpu.read(self.space + offset, size)

    async def config_write(self, offset: int, size: int, value: int) -> None:
        await self.cpu.write(self.space + offset, size, value)

    def capabilities(self) -> list[tuple[int, int]]:
        """(id, offset) of each, by the list."""
        found = []
        at = self.config_read(header.CAPABILITIES_POINTER, 1)
        while at:
            found.append((self.config_read(at, 1), at))
            at = self.config_read(at + 1, 1)
        return found

    async def probe(self) -> None:
        """Find the parts, switch memory decoding on."""
        await self.config_write(header.COMMAND, 2, header.COMMAND_MEMORY | 4)
        base = self.config_read(header.BAR0, 8) & ~0xF
        for kind, at in self.capabilities():
            if kind == msix.CAPABILITY_ID:
                self.control = at + 2
                self.vectors = (self.config_read(at + 2, 2) & 0x7FF) + 1
                self.table = base + (self.config_read(at + 4, 4) & ~7)
            elif kind == pci.VENDOR_CAPABILITY_ID:
                cfg_type = self.config_read(at + 3, 1)
                offset, length = self.config_read(at + 8, 4), self.config_read(at + 12, 4)
                self.parts[cfg_type] = (base + offset, length)
                if cfg_type == pci.CFG_NOTIFY:
                    self.multiplier = self.config_read(at + 16, 4)

    async def enable_msix(self) -> None:
        """Vectors on and unmasked: 0 for the configuration, one more for each queue."""
        await self.config_write(self.control, 2, msix.CONTROL_ENABLE)
        for vector in range(self.vectors):
            at = self.table + msix.ENTRY_BYTES * vector
            for offset, value in ((0, 0xFEE0_1000), (4, 0), (8, _DATA + vector), (12, 0)):
                await self.cpu.write(at + offset, 4, value)

    def read(self, offset: int, size: int) -> int:
        """A field of the common configuration."""
        return self.cpu.read(self.parts[pci.CFG_COMMON][0] + offset, size)

    async def write(self, offset: int, size: int, value: int) -> None:
        await self.cpu.write(self.parts[pci.CFG_COMMON][0] + offset, size, value)

    def status(self) -> int:
        return self.read(pci_common.DEVICE_STATUS, 1)

    async def set_status(self, value: int) -> None:
        await self.write(pci_common.DEVICE_STATUS, 1, value)

    async def read_features(self) -> int:
        words = []
        for select in (0, 1):
            await self.write(pci_common.DEVICE_FEATURE_SELECT, 4, select)
            words.append(self.read(pci_common.DEVICE_FEATURE, 4))
        return words[0] | words[1] << 32

    async def write_features(self, value: int) -> None:
        for select in (0, 1):
            await self.write(pci_common.DRIVER_FEATURE_SELECT, 4, select)
            await self.write(pci_common.DRIVER_FEATURE, 4, value >> 32 * select & 0xFFFF_FFFF)

    async def queue_size_max(self, index: int) -> int:
        await self.write(pci_common.QUEUE_SELECT, 2, index)
        return self.read(pci_common.QUEUE_SIZE, 2)

    async def set_up_queue(self, index: int, queue: DriverQueue, *, ready: bool = True) -> None:
        await self.write(pci_common.QUEUE_SELECT, 2, index)
        await self.write(pci_common.QUEUE_SIZE, 2, queue.size)
        for low, gpa in (
            (pci_common.QUEUE_DESC, queue.desc_gpa),
            (pci_common.QUEUE_DRIVER, queue.driver_gpa),
            (pci_common.QUEUE_DEVICE, queue.device_gpa),
        ):
            await self.write(low, 4, gpa & 0xFFFF_FFFF)
            await self.write(low + 4, 4, gpa >> 32)
        await self.write(pci_common.QUEUE_MSIX_VECTOR, 2, index + 1)
        if ready:
            await self.write(pci_common.QUEUE_ENABLE, 2, 1)

    async def set_up(self, features: int | None = None, *, size: int = 64) -> None:
        """With all vectors."""
        await self.probe()
        await self.enable_msix()
        await super().set_up(features, size=size)

    async def negotiate(self, features: int) -> bool:
        accepted = await super().negotiate(features)
        await self.write(pci_common.CONFIG_MSIX_VECTOR, 2, 0)
        return accepted

    def notify_gpa(self, index: int) -> int:
        """Where a queue is notified; its queue_notify_off is its index."""
        return self.parts[pci.CFG_NOTIFY][0] + self.multiplier * index

    def kick(self, index: int) -> None:
        os.eventfd_write(self.notifications.at[self.notify_gpa(index)], 1)

    async def interrupted(self) -> int:
        """Wait for a message; its data tells the vector."""
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        fds = tuple(self.messages.connected)
        for fd in fds:
            loop.add_reader(fd, ready.set)
        try:
            async with asyncio.timeout(_HANG_S):
                await ready.wait()
        finally:
            for fd in fds:
                loop.remove_reader(fd)
        about = await self.take_interrupts()
        assert about, "an eventfd was written that is no vector's"
        return about

    async def take_interrupts(self) -> int:
        fds = tuple(self.messages.connected)
        sent = [message for fd in fds if (message := self.messages.sent(fd)) is not None]
        return sum({CONFIG_CHANGE if data == _DATA else USED_BUFFER for _, data in sent})

    def read_config(self, offset: int, size: int) -> int:
        return self.cpu.read(self.parts[pci.CFG_DEVICE][0] + offset, size)

    async def write_config(self, offset: int, size: int, value: int) -> None:
        await self.cpu.write(self.parts[pci.CFG_DEVICE][0] + offset, size, value)

    def config_generation(self) -> int:
        return self.read(pci_common.CONFIG_GENERATION, 1)


@dataclass
class PciRig(Generic[D]):
    """errors: what the device reported to its machine."""

    device: D
    transport: pci.PciTransport
    driver: PciDriver
    cpu: Cpu
    memory: GuestMemory
    messages: FakeMessages
    notifications: FakeNotifications
    errors: list[BaseException] = field(default_factory=list)


@asynccontextmanager
async def pci_rig(
    build: Callable[[DeviceContext], Awaitable[D]], *, io_threads: int = 0, cpus: int = 1
) -> AsyncIterator[PciRig[D]]:
    """A device as number 1 of a PCI bus; built and taken down as the machine does it."""
    errors: list[BaseException] = []
    messages, notifications = FakeMessages(), FakeNotifications()
    async with AsyncExitStack() as stack:
        root = RootComplex(ECAM, (LOW, HIGH))
        stack.callback(root.close)
        device, memory = await built(
            build, Interrupts(), errors, stack, io_threads=io_threads, cpus=cpus
        )
        transport = pci.PciTransport(device, messages, notifications, notify_bytes=0)
        stack.callback(transport.close)
        stack.push_async_callback(device.end)
        root.add(1, transport.function)
        cpu = Cpu(root)
        cpu.registers += (transport.common.registers, transport.msix.table)
        driver = PciDriver(cpu, memory, messages, notifications)
        yield PciRig(device, transport, driver, cpu, memory, messages, notifications, errors)
