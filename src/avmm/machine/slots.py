"""Virtio devices in their virtio-mmio slots: address, interrupt and notifications."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from avmm.bus.bus import Bus
from avmm.errors import ConfigError
from avmm.kvm.vm import Vm
from avmm.machine.config import Config
from avmm.machine.eventfd import owned_eventfd
from avmm.mem import layout
from avmm.mem.guest import GuestMemory
from avmm.units import Gpa
from avmm.virtio.device import VirtioDevice
from avmm.virtio.devtype import DeviceContext
from avmm.virtio.home import Homes
from avmm.virtio.interrupt import Interrupts
from avmm.virtio.transport import mmio

_NOTIFY_BYTES = 4


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a configured device goes."""

    index: int
    id: str
    config: Any
    gpa: Gpa
    gsi: int


def assign_slots(config: Config) -> list[Slot]:
    """A slot for each device, in the order of the configuration.

    Raises ConfigError("devices") when there are more than interrupt lines.
    """
    devices = config.devices()
    if len(devices) > len(layout.GSI_VIRTIO):
        raise ConfigError(
            "devices",
            f"{len(devices)} devices: virtio-mmio has interrupt lines for {len(layout.GSI_VIRTIO)}",
        )
    return [
        Slot(
            index,
            id,
            device,
            Gpa(layout.VIRTIO_MMIO + index * layout.VIRTIO_MMIO_STRIDE_BYTES),
            layout.GSI_VIRTIO[index],
        )
        for index, (id, device) in enumerate(devices)
    ]


async def plug(
    slots: Sequence[Slot],
    vm: Vm,
    bus: Bus,
    memory: GuestMemory,
    homes: Homes,
    stack: AsyncExitStack,
    on_error: Callable[[BaseException], None],
) -> list[VirtioDevice]:
    """Build each device and connect it to the bus and to KVM; `stack` takes them down."""
    return [await _plug_one(slot, vm, bus, memory, homes, stack, on_error) for slot in slots]


async def _plug_one(
    slot: Slot,
    vm: Vm,
    bus: Bus,
    memory: GuestMemory,
    homes: Homes,
    stack: AsyncExitStack,
    on_error: Callable[[BaseException], None],
) -> VirtioDevice:
    irq_fd = owned_eventfd(stack)
    vm.irqfd(irq_fd, slot.gsi)
    interrupts = Interrupts(irq_fd)
    stack.callback(interrupts.close)
    context = DeviceContext(
        id=slot.id,
        memory=memory,
        interrupts=interrupts,
        homes=homes,
        loop=asyncio.get_running_loop(),
        stack=stack,
        on_error=on_error,
    )
    device: VirtioDevice = await slot.config.device_type.build(slot.config, context)
    stack.push_async_callback(device.quiesce)
    transport = mmio.MmioTransport(device)
    bus.add(slot.gpa, mmio.SIZE_BYTES, transport, slot.id)
    for offset, value, fd in transport.kick_registrations():
        vm.ioeventfd(fd, slot.gpa + offset, _NOTIFY_BYTES, value)
    return device
