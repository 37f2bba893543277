"""Host memory behind guest RAM."""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import Self

from avmm.errors import HostError
from avmm.native import CData, ffi
from avmm.units import MIB, Gpa, align_up, format_size

HUGE_PAGE_BYTES = 2 * MIB

_MAP_NORESERVE = 0x4000
"""Python has no name for it: pages are promised when they are touched, not when they are mapped."""


class Region:
    """A mapped range of guest RAM. Owns `mapping`; the range begins `start` bytes into it."""

    def __init__(self, gpa: Gpa, size_bytes: int, mapping: mmap.mmap, start: int) -> None:
        self.gpa = gpa
        self.size_bytes = size_bytes
        self.map = mapping
        self.view = memoryview(mapping)[start : start + size_bytes]
        self._buffer = ffi.from_buffer("uint8_t[]", self.view)

    @classmethod
    def create(cls, gpa: Gpa, size_bytes: int, *, hugepages: bool) -> Self:
        """New memory.

        Without reserved huge pages it is anonymous, asks for transparent huge pages and begins on
        a 2 MiB boundary. A memfd could be shared with other processes, but on a stock host shmem
        gets no huge pages: one page fault for each 4 KiB, on our side and in KVM's tables, made a
        Debian guest reach user space a quarter later.
        """
        mapping = _map_reserved(size_bytes) if hugepages else _map_anonymous(size_bytes)
        hva = int(ffi.cast("uintptr_t", ffi.from_buffer(mapping)))
        return cls(gpa, size_bytes, mapping, align_up(hva, HUGE_PAGE_BYTES) - hva)

    @property
    def native(self) -> CData:
        """The host address, as `uint8_t *`."""
        return self._buffer

    @property
    def hva(self) -> int:
        """The host address, as a number."""
        return int(ffi.cast("uintptr_t", self._buffer))

    def close(self) -> None:
        """Unmap. Nothing native may use the memory any more; idempotent."""
        ffi.release(self._buffer)
        self.view.release()
        # A view that a caller still holds keeps the pages mapped until it is dropped.
        with contextlib.suppress(BufferError):
            self.map.close()


def _map_anonymous(size_bytes: int) -> mmap.mmap:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    # Guest and host addresses have to agree modulo 2 MiB, or KVM cannot use a huge page.
    mapping = mmap.mmap(-1, size_bytes + HUGE_PAGE_BYTES, flags=flags)
    # Refused where the kernel was built without transparent huge pages; small ones do then.
    with contextlib.suppress(OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


def _map_reserved(size_bytes: int) -> mmap.mmap:
    """Of the pages reserved by vm.nr_hugepages, all of them now."""
    memfd = os.memfd_create("avmm-guest", os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    try:
        os.ftruncate(memfd, size_bytes)
        return mmap.mmap(memfd, size_bytes, flags=mmap.MAP_SHARED)
    finally:
        os.close(memfd)  # the mapping keeps the memory


def memory_error(size_bytes: int, hugepages: bool, errno: int | None) -> HostError:
    """The error for guest memory that the host cannot give."""
    if hugepages:
        pages = -(-size_bytes // HUGE_PAGE_BYTES)
        remedy = f"{pages} huge pages of 2M are needed: see vm.nr_hugepages, or drop hugepages"
    else:
        remedy = "give the guest less memory"
    return HostError(
        "memory",
        op=f"Mapping {format_size(size_bytes)} of guest memory",
        errno=errno,
        remedy=remedy,
    )
