"""Host memory behind guest RAM: one memfd, mapped once per RAM range."""

from __future__ import annotations

import contextlib
import mmap
import os

from avmm.errors import HostError
from avmm.native import CData, ffi
from avmm.units import MIB, Gpa, format_size

HUGE_PAGE_BYTES = 2 * MIB


class Region:
    """A mapped range of guest RAM. Owns the mapping, not the memfd."""

    def __init__(self, memfd: int, gpa: Gpa, size_bytes: int, offset_bytes: int) -> None:
        self.gpa = gpa
        self.size_bytes = size_bytes
        self.offset_bytes = offset_bytes
        self.map = mmap.mmap(
            memfd,
            size_bytes,
            flags=mmap.MAP_SHARED,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
            offset=offset_bytes,
        )
        self._buffer = ffi.from_buffer("uint8_t[]", self.map)
        self.view = memoryview(self.map)

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
        self.view.release()
        ffi.release(self._buffer)
        # A view that a caller still holds keeps the pages mapped until it is dropped.
        with contextlib.suppress(BufferError):
            self.map.close()


def open_memfd(size_bytes: int, hugepages: bool) -> int:
    """A sealed-size memfd; HostError("memory") when the host refuses."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    if hugepages:
        flags |= os.MFD_HUGETLB | os.MFD_HUGE_2MB
    fd = os.memfd_create("avmm-guest", flags)
    try:
        os.ftruncate(fd, size_bytes)
    except OSError as e:
        os.close(fd)
        raise memory_error(size_bytes, hugepages, e.errno) from e
    return fd


def memory_error(size_bytes: int, hugepages: bool, errno: int | None) -> HostError:
    """The error for guest memory that the host cannot give."""
    if hugepages:
        pages = -(-size_bytes // HUGE_PAGE_BYTES)
        remedy = f"{pages} huge pages of 2M are needed: see vm.nr_hugepages, or drop hugepages"
    else:
        remedy = "give the guest less memory"
    return HostError(
        "memory", op=f"Mapping {format_size(size_bytes)} of guest memory", errno=errno, remedy=remedy
    )
