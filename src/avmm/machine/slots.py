"""Virtio devices in their slots, on whichever transport."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Protocol

from avmm.descriptors import Opener
from avmm.errors import ConfigError, GuestFault
from avmm.hostnet.tap import TapOpener
from avmm.log import GuestLog
from avmm.machine.config import Config
from avmm.mem import layout
from avmm.mem.guest import GuestMemory
from avmm.native import CData
from avmm.pci.root import DEVICES as PCI_DEVICES
from avmm.virtio.device import VirtioDevice
from avmm.virtio.devtype import DeviceContext
from avmm.virtio.features import RingLayout
from avmm.virtio.home import Homes
from avmm.virtio.interrupt import Interrupts

_ROOM = {
    "pci": (PCI_DEVICES - 1, "the PCI bus has room for"),
    "mmio": (len(layout.GSI_VIRTIO), "virtio-mmio has interrupt lines for"),
}


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a configured device goes. ring: the layout of rings that it offers."""

    index: int
    id: str
    config: Any
    ring: RingLayout


class Backplane(Protocol):
    """What devices are plugged into: one transport's connections to buses and KVM. Loop."""

    def interrupts(self, slot: Slot) -> Interrupts:
        """The ways to interrupt its driver, for a device that is about to be built."""
        ...

    def connect(self, slot: Slot, device: VirtioDevice) -> None:
        """Put a built device where its driver finds it."""
        ...

    def dispatch(self, dispatch: CData) -> list[int]:
        """Tell the vCPUs' C loop what it answers by itself; the results of its functions."""
        ...


def assign_slots(config: Config) -> list[Slot]:
    """A slot for each device, in the order of the configuration.

    Raises ConfigError("devices") when there are more than the transport has room for.
    """
    devices = config.all_devices()
    room, why = _ROOM[config.transport]
    if len(devices) > room:
        raise ConfigError("devices", f"{len(devices)} devices: {why} {room}")
    return [Slot(index, id, device, config.ring) for index, (id, device) in enumerate(devices)]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all devices of a machine share; see DeviceContext."""

    memory: GuestMemory
    homes: Homes
    stack: AsyncExitStack
    cpus: int
    on_error: Callable[[BaseException], None]
    on_fault: Callable[[str, GuestFault], None]
    on_ready: Callable[[str, bool], None]
    on_link: Callable[[str, bool], None]
    guest_log: GuestLog
    opener: Opener
    open_tap: TapOpener

    def context(self, slot: Slot, interrupts: Interrupts) -> DeviceContext:
        """For the device of one slot."""
        return DeviceContext(
            id=slot.id,
            memory=self.memory,
            interrupts=interrupts,
            homes=self.homes,
            loop=asyncio.get_running_loop(),
            stack=self.stack,
            on_error=self.on_error,
            cpus=self.cpus,
            ring=slot.ring,
            on_fault=self.on_fault,
            on_ready=self.on_ready,
            on_link=self.on_link,
            guest_log=self.guest_log,
            opener=self.opener,
            open_tap=self.open_tap,
        )


async def plug(
    slots: Sequence[Slot], backplane: Backplane, surroundings: Surroundings
) -> dict[str, VirtioDevice]:
    """Build each device and connect it; by id. The surroundings' stack takes them down."""
    stack = surroundings.stack
    devices: dict[str, VirtioDevice] = {}
    for slot in slots:
        interrupts = backplane.interrupts(slot)
        stack.callback(interrupts.close)
        context = surroundings.context(slot, interrupts)
        device: VirtioDevice = await slot.config.device_type.build(slot.config, context)
        # What connects it goes when it is at rest and nothing is raised any more.
        backplane.connect(slot, device)
        stack.push_async_callback(device.end)
        devices[slot.id] = device
    return devices
