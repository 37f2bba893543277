"""The checked door from guest physical addresses to bytes, for Python."""

from __future__ import annotations

from typing import Self

from avmm.errors import GuestFault
from avmm.mem.layout import ram_ranges
from avmm.mem.region import Region, memory_error
from avmm.native import CData, ffi, lib
from avmm.units import Gpa


class GuestMemory:
    """All RAM of one guest. Any thread may read and write; the guest does so at the same time."""

    def __init__(self, regions: tuple[Region, ...] = ()) -> None:
        self.native: CData = ffi.new("struct av_gmem *")
        self._place(regions)

    def _place(self, regions: tuple[Region, ...]) -> None:
        """Make `regions` all there is. No ring may be running."""
        self.regions = regions
        self.size_bytes = sum(region.size_bytes for region in regions)
        self.native.count = len(regions)
        for slot, region in enumerate(regions):
            self.native.region[slot].gpa = region.gpa
            self.native.region[slot].size_bytes = region.size_bytes
            self.native.region[slot].hva = region.native

    @classmethod
    def create(cls, size_bytes: int, *, hugepages: bool = False) -> Self:
        """`size_bytes` of zeroed RAM, placed by mem/layout.

        size_bytes: a multiple of the page size in use. Raises HostError("memory").
        """
        regions: list[Region] = []
        try:
            for gpa, size in ram_ranges(size_bytes):
                regions.append(Region.create(gpa, size, hugepages=hugepages))
        except OSError as e:
            for region in regions:
                region.close()
            raise memory_error(size_bytes, hugepages, e.errno) from e
        return cls(tuple(regions))

    @property
    def ranges(self) -> tuple[tuple[Gpa, int], ...]:
        """(gpa, size in bytes) of each region, ascending."""
        return tuple((region.gpa, region.size_bytes) for region in self.regions)

    def view(self, gpa: int, size_bytes: int) -> memoryview:
        """The guest's own bytes, writable, without a copy.

        Raises GuestFault("bad-gpa") unless [gpa, gpa + size_bytes) lies inside one region.
        """
        for region in self.regions:
            offset = gpa - region.gpa
            if offset >= 0 and 0 <= size_bytes <= region.size_bytes - offset:
                return region.view[offset : offset + size_bytes]
        raise GuestFault("bad-gpa", f"No {size_bytes} bytes of guest memory at {gpa:#x}")

    def hva(self, gpa: int, size_bytes: int) -> int:
        """The host address of the guest's own bytes, for the kernel; raises as view()."""
        native = lib.av_gmem_hva(self.native, gpa, size_bytes)
        if not native:
            raise GuestFault("bad-gpa", f"No {size_bytes} bytes of guest memory at {gpa:#x}")
        return int(ffi.cast("uintptr_t", native))

    def read(self, gpa: int, size_bytes: int) -> bytes:
        """A copy of guest memory; raises GuestFault("bad-gpa")."""
        return bytes(self.view(gpa, size_bytes))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Write `data` to guest memory; raises GuestFault("bad-gpa") and then writes nothing."""
        self.view(gpa, len(data))[:] = data

    def close(self) -> None:
        """Unmap; native users must be gone. Idempotent."""
        for region in self.regions:
            region.close()
