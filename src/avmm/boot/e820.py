"""The memory map that the guest is told."""

from __future__ import annotations

from collections.abc import Sequence

from avmm.mem import layout
from avmm.units import Gpa

USABLE = 1
RESERVED = 2


def memory_map(ranges: Sequence[tuple[Gpa, int]]) -> list[tuple[int, int, int]]:
    """(gpa, size in bytes, type) in ascending order. ranges: the guest's RAM.

    The block from the EBDA to 1 MiB holds the ACPI tables and is reserved.
    """
    table: list[tuple[int, int, int]] = []
    for gpa, size in ranges:
        if gpa == 0:
            table.append((0, min(size, layout.EBDA), USABLE))
            if size > layout.EBDA:
                top = min(size, layout.HIGH_RAM)
                table.append((layout.EBDA, top - layout.EBDA, RESERVED))
            if size > layout.HIGH_RAM:
                table.append((layout.HIGH_RAM, size - layout.HIGH_RAM, USABLE))
        else:
            table.append((gpa, size, USABLE))
    return table
