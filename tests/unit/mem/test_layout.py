"""The memory map: nothing overlaps, whatever the size of RAM."""

from __future__ import annotations

import itertools

import pytest

from avmm.mem import layout
from avmm.units import GIB, MIB


@pytest.mark.parametrize(
    "ram_bytes", [2 * MIB, 256 * MIB, 3 * GIB - MIB, 3 * GIB, 3 * GIB + MIB, 5 * GIB, 1000 * GIB]
)
def test_ram_and_windows_are_apart(ram_bytes: int) -> None:
    slots = len(layout.GSI_VIRTIO) * layout.VIRTIO_MMIO_STRIDE_BYTES
    ranges = [
        *layout.ram_ranges(ram_bytes),
        (layout.PCI_MEMORY, layout.PCI_MEMORY_BYTES),
        (layout.VIRTIO_MMIO, slots),
        (layout.PCI_ECAM, layout.PCI_ECAM_BYTES),
        (layout.IOAPIC, 0x1000),
        (layout.LAPIC, 0x1000),
        (layout.KVM_IDENTITY_MAP, 0x1000),
        (layout.KVM_TSS, 0x3000),
        (layout.pci_memory_high(ram_bytes), layout.PCI_MEMORY_HIGH_BYTES),
    ]
    ranges.sort()
    for (gpa, size_bytes), (after, _) in itertools.pairwise(ranges):
        assert gpa + size_bytes <= after
    assert ranges[-1][0] % GIB == 0


def test_a_small_guest_is_within_36_bits() -> None:
    end = layout.pci_memory_high(256 * MIB) + layout.PCI_MEMORY_HIGH_BYTES
    assert end <= 1 << 36
