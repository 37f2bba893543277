"""Slots of virtio-pci: the devices of bus 0, from number 1 on."""

from __future__ import annotations

from contextlib import AsyncExitStack

from avmm.boot.acpi.tables import AcpiPciRoot
from avmm.bus.bus import Bus
from avmm.bus.registers import Registers
from avmm.kvm.routes import MsiRoutes
from avmm.kvm.vm import Vm
from avmm.machine.slots import Slot
from avmm.mem import layout
from avmm.native import CData, lib
from avmm.pci.root import MemoryWindow, RootComplex
from avmm.virtio.device import VirtioDevice
from avmm.virtio.interrupt import Interrupts
from avmm.virtio.transport.pci import PciTransport

_NOTIFY_BYTES = 2


def acpi_root(ram_bytes: int) -> AcpiPciRoot:
    """What the guest is told of the host bridge."""
    windows = tuple((w.gpa, w.size_bytes) for w in _windows(ram_bytes))
    return AcpiPciRoot(layout.PCI_ECAM, layout.PCI_ECAM_BYTES, windows)


class PciSlots:
    """The Backplane of virtio-pci: the root complex on `bus`, and what vCPUs answer of it.

    any_length: whether KVM takes notifications of every width.
    """

    def __init__(
        self, vm: Vm, bus: Bus, ram_bytes: int, stack: AsyncExitStack, *, any_length: bool
    ) -> None:
        self._vm = vm
        self._stack = stack
        self._notify_bytes = 0 if any_length else _NOTIFY_BYTES
        self._messages = MsiRoutes(vm, layout.IOAPIC_PINS)
        self._root = RootComplex(layout.PCI_ECAM, _windows(ram_bytes))
        stack.callback(self._root.close)
        self._registers: list[Registers] = []
        bus.add(layout.PCI_ECAM, layout.PCI_ECAM_BYTES, self._root, "PCI configuration")
        for window in self._root.windows:
            bus.add(window.gpa, window.size_bytes, self._root.memory(window), "PCI memory")

    def interrupts(self, slot: Slot) -> Interrupts:
        """One for each queue; the driver gives them vectors."""
        return Interrupts()

    def connect(self, slot: Slot, device: VirtioDevice) -> None:
        """Put it on the bus."""
        transport = PciTransport(device, self._messages, self._vm, notify_bytes=self._notify_bytes)
        self._stack.callback(transport.close)
        self._root.add(slot.index + 1, transport.function)
        self._registers += (transport.common.registers, transport.msix.table)

    def dispatch(self, dispatch: CData) -> list[int]:
        """The C loop answers configuration spaces and devices' registers, as far as they say."""
        lib.av_dispatch_set_ecam(dispatch, layout.PCI_ECAM, layout.PCI_ECAM_BYTES)
        spaces = [function.registers for function in self._root.functions.values()]
        return [
            lib.av_dispatch_add_regs(dispatch, registers.native)
            for registers in (*spaces, *self._registers)
        ]


def _windows(ram_bytes: int) -> tuple[MemoryWindow, ...]:
    return (
        MemoryWindow(layout.PCI_MEMORY, layout.PCI_MEMORY_BYTES),
        MemoryWindow(layout.pci_memory_high(ram_bytes), layout.PCI_MEMORY_HIGH_BYTES),
    )
