"""The x86-64 guest physical memory map, port map and interrupt map, in one place."""

from __future__ import annotations

from avmm.units import GIB, KIB, MIB, Gpa, align_up

# Below 1 MiB: what boot/ writes. Everything here is in E820 usable RAM except the last block.
GDT = Gpa(0x500)
PVH_START_INFO = Gpa(0x6000)
"""hvm_start_info, followed by its module list and memory map (one page in all)."""
ZERO_PAGE = Gpa(0x7000)
"""struct boot_params of the Linux/x86 boot protocol, one page."""
BOOT_STACK_TOP = Gpa(0x8FF0)
PAGE_TABLES = Gpa(0x9000)
"""PML4, PDPT and page directories that identity-map the first 4 GiB: 6 pages."""
CMDLINE = Gpa(0x20000)
CMDLINE_MAX_BYTES = 64 * KIB
"""Room, terminator included; the kernel's own limit (2048 on x86) is checked in boot/."""
EBDA = Gpa(0x9FC00)
"""Usable low memory ends here."""
ACPI_TABLES = Gpa(0xE0000)
ACPI_TABLES_BYTES = 128 * KIB - 16
"""RSDP first, in the area that the ACPI specification tells an OS to scan (5.2.5.1)."""

RESET_VECTOR = Gpa(0xFFFF0)
"""Where a processor jumps to start a PC's firmware, F000:FFF0."""

HIGH_RAM = Gpa(1 * MIB)
KERNEL_64BIT_DEFAULT = Gpa(16 * MIB)

# The 32-bit hole: RAM ends at or below LOW_RAM_END and goes on at 4 GiB.
LOW_RAM_END = Gpa(3 * GIB)
RAM_ABOVE_4G = Gpa(4 * GIB)

PCI_MEMORY = Gpa(0xC000_0000)
PCI_MEMORY_BYTES = 256 * MIB
"""Where PCI devices are at the start, below 4 GiB."""
PCI_MEMORY_HIGH_BYTES = 16 * GIB
"""Where a guest may move them, see pci_memory_high()."""
VIRTIO_MMIO = Gpa(0xD000_0000)
VIRTIO_MMIO_STRIDE_BYTES = 0x1000
VIRTIO_MMIO_SLOT_BYTES = 0x200

PCI_ECAM = Gpa(0xE000_0000)
PCI_ECAM_BYTES = 1 * MIB
"""Bus 0 alone."""
IOAPIC = Gpa(0xFEC0_0000)
LAPIC = Gpa(0xFEE0_0000)
KVM_IDENTITY_MAP = Gpa(0xFFFB_C000)
"""One page that KVM uses on processors without unrestricted guest mode."""
KVM_TSS = Gpa(0xFFFB_D000)
"""Three pages, likewise."""

# Ports.
PORT_I8042_DATA = 0x60
PORT_I8042_COMMAND = 0x64
PORT_CMOS_INDEX = 0x70
PORT_CMOS_DATA = 0x71
PORT_COM1 = 0x3F8
PORT_PVPANIC = 0x505
PORT_PCI_ADDRESS = 0xCF8
PORT_PCI_BYTES = 8
"""PCI configuration: address and data."""
PORT_PCI_DEVICES = 0x1000
PORT_PCI_DEVICES_BYTES = 0xF000
"""Room for I/O BARs, which no device of ours has; an OS expects a host bridge to have some."""
PORT_ACPI = 0x600
"""acpi_pm: sleep control, sleep status, reset, event select (one byte each)."""
PORT_ACPI_BYTES = 4
PORT_ACPI_RESET = PORT_ACPI + 2

# Global system interrupts: pins of the in-kernel IOAPIC, all edge-triggered, active high.
GSI_COM1 = 4
GSI_ACPI_EVENT = 5
GSI_RTC = 8
GSI_VIRTIO = (16, 17, 18, 19, 20, 21, 22, 23, 6, 7, 10, 11, 12, 14, 15)
"""In the order in which virtio-mmio slots take them."""
IOAPIC_PINS = 24

CPUS_MAX = 255
"""xAPIC ids are 8 bits wide and 255 is broadcast."""


def ram_ranges(size_bytes: int) -> tuple[tuple[Gpa, int], ...]:
    """(gpa, size in bytes) of each RAM range of a guest with `size_bytes` of memory."""
    low = min(size_bytes, LOW_RAM_END)
    if size_bytes == low:
        return ((Gpa(0), low),)
    return ((Gpa(0), low), (RAM_ABOVE_4G, size_bytes - low))


def pci_memory_high(ram_bytes: int) -> Gpa:
    """The PCI memory window above all RAM. It stays low: a processor may have no more than 36
    bits of physical address."""
    gpa, size = ram_ranges(ram_bytes)[-1]
    return Gpa(max(RAM_ABOVE_4G, align_up(gpa + size, GIB)))
