"""An address space of devices: ports or memory-mapped registers."""

from __future__ import annotations

from bisect import bisect_right, insort
from dataclasses import dataclass, field

from avmm.bus.region import Region
from avmm.errors import BugError


@dataclass(frozen=True, order=True, slots=True)
class Range:
    """`size` addresses from `base` that belong to `region`."""

    base: int
    size: int = field(compare=False)
    region: Region = field(compare=False)
    name: str = field(compare=False)


class Bus:
    """Ranges are added while the machine is built and looked up by vCPU threads afterwards."""

    def __init__(self) -> None:
        self._ranges: list[Range] = []
        self._bases: list[int] = []

    def add(self, base: int, size: int, region: Region, name: str) -> None:
        """Give [base, base + size) to `region`; BugError("bus-overlap") when it is taken."""
        for other in self._ranges:
            if base < other.base + other.size and other.base < base + size:
                raise BugError("bus-overlap", f"{name} at {base:#x} overlaps {other.name}")
        insort(self._ranges, Range(base, size, region, name))
        self._bases = [r.base for r in self._ranges]

    def find(self, address: int, size: int) -> tuple[Region, int] | None:
        """The region that holds all of the access, and the offset in it; None when unassigned."""
        index = bisect_right(self._bases, address) - 1
        if index < 0:
            return None
        found = self._ranges[index]
        offset = address - found.base
        if offset + size > found.size:
            return None
        return found.region, offset

    def ranges(self) -> tuple[Range, ...]:
        """All ranges, ascending."""
        return tuple(self._ranges)
