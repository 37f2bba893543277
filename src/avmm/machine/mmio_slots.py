"""Slots of virtio-mmio: a page of registers and an interrupt line each, found by ACPI."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack

from avmm.boot.acpi.tables import AcpiMmioDevice
from avmm.bus.bus import Bus
from avmm.eventfd import owned_eventfd
from avmm.kvm.vm import Vm
from avmm.machine.slots import Slot
from avmm.mem import layout
from avmm.native import CData, lib
from avmm.units import Gpa
from avmm.virtio.device import VirtioDevice
from avmm.virtio.interrupt import Interrupts
from avmm.virtio.transport import mmio

_NOTIFY_BYTES = 4


def acpi_devices(slots: Sequence[Slot]) -> list[AcpiMmioDevice]:
    """What the guest is told of them."""
    return [AcpiMmioDevice(s.index, _gpa(s), mmio.SIZE_BYTES, _gsi(s)) for s in slots]


class MmioSlots:
    """The Backplane of virtio-mmio. bus: of memory-mapped registers."""

    def __init__(self, vm: Vm, bus: Bus, stack: AsyncExitStack) -> None:
        self._vm = vm
        self._bus = bus
        self._stack = stack
        self._devices: list[tuple[Slot, VirtioDevice]] = []

    def interrupts(self, slot: Slot) -> Interrupts:
        """One line for all that a device has to say."""
        irq_fd = owned_eventfd(self._stack)
        self._vm.irqfd(irq_fd, _gsi(slot))
        return Interrupts(irq_fd)

    def connect(self, slot: Slot, device: VirtioDevice) -> None:
        """Put its registers on the bus and its notifications to KVM."""
        transport = mmio.MmioTransport(device)
        self._bus.add(_gpa(slot), mmio.SIZE_BYTES, transport, slot.id)
        for offset, value, fd in transport.kick_registrations():
            self._vm.ioeventfd(fd, _gpa(slot) + offset, _NOTIFY_BYTES, value)
        self._devices.append((slot, device))

    def dispatch(self, dispatch: CData) -> list[int]:
        """The C loop answers the interrupt registers."""
        return [
            lib.av_dispatch_add_interrupt(dispatch, _gpa(slot), device.interrupts.config.native)
            for slot, device in self._devices
        ]


def _gpa(slot: Slot) -> Gpa:
    return Gpa(layout.VIRTIO_MMIO + slot.index * layout.VIRTIO_MMIO_STRIDE_BYTES)


def _gsi(slot: Slot) -> int:
    return layout.GSI_VIRTIO[slot.index]
