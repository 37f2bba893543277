"""A front-end's memory: the files behind its guest's RAM, mapped here.

A file that shrinks under its mapping turns an access to what is gone into SIGBUS, which ends this
process. A sealed memfd cannot shrink, and QEMU's memory-backend-memfd is one; for anything else
the front-end has to be trusted, or refused by `require_seals`.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import mmap
import os
import stat
from collections.abc import Sequence

from avmm.errors import GuestFault, HostError
from avmm.mem.guest import GuestMemory
from avmm.mem.region import Region
from avmm.units import Gpa, align_up
from avmm.vhost_user.message import MemoryTable, TableRegion

log = logging.getLogger(__name__)

_ADDRESSES = 1 << 64


class FrontEndMemory(GuestMemory):
    """Guest memory that comes and goes with a front-end. Loop; replace() and close() only while
    no ring runs."""

    def __init__(self, *, require_seals: bool = False) -> None:
        super().__init__()
        self._require_seals = require_seals
        self._table: tuple[TableRegion, ...] = ()

    def replace(self, table: MemoryTable, fds: Sequence[int]) -> None:
        """Map the files of a table in the place of what is mapped; `fds` stay the caller's.

        Raises GuestFault("front-end") or HostError("memory"), and then nothing is mapped.
        """
        self.close()
        _check_table(table.regions)
        mapped: list[Region] = []
        try:
            for region, fd in zip(table.regions, fds, strict=True):
                mapped.append(self._map(region, fd))
        except BaseException:
            for earlier in mapped:
                earlier.close()
            raise
        self._table = table.regions
        self._place(tuple(mapped))

    def gpa_of(self, uva: int) -> Gpa:
        """The guest physical address of one in the front-end's address space.

        Raises GuestFault("front-end") when it is in no region.
        """
        for region in self._table:
            if 0 <= uva - region.uva < region.size_bytes:
                return Gpa(region.gpa + uva - region.uva)
        raise GuestFault("front-end", f"Address {uva:#x} is in no region of the memory table")

    def close(self) -> None:
        """Unmap all. Idempotent."""
        regions = self.regions
        self._table = ()
        self._place(())
        for region in regions:
            region.close()

    def _map(self, region: TableRegion, fd: int) -> Region:
        what = f"Memory at {region.gpa:#x}"
        mapping, start = self.map(what, fd, region.size_bytes, region.offset_bytes)
        return Region(Gpa(region.gpa), region.size_bytes, mapping, start)

    def map(self, what: str, fd: int, size_bytes: int, offset_bytes: int) -> tuple[mmap.mmap, int]:
        """A piece of a front-end's file, and where it begins in the mapping.

        what: for the messages. Raises GuestFault("front-end") or HostError("memory").
        """
        file = os.fstat(fd)
        if not stat.S_ISREG(file.st_mode):
            raise GuestFault("front-end", f"{what}: its descriptor is not a file's")
        end = offset_bytes + size_bytes
        if end > file.st_size:
            raise GuestFault(
                "front-end",
                f"{what}: {size_bytes} bytes at {offset_bytes} of a file of {file.st_size}",
            )
        self._check_seals(what, fd)
        # A huge page is mapped as a whole, and hugetlbfs says its size as the block size.
        page_bytes = max(file.st_blksize, mmap.PAGESIZE)
        start = offset_bytes & -page_bytes
        whole_bytes = min(align_up(end, page_bytes), file.st_size) - start
        try:
            mapping = mmap.mmap(fd, whole_bytes, flags=mmap.MAP_SHARED, offset=start)
        except (OSError, ValueError) as e:  # ValueError: it has shrunk meanwhile
            raise HostError(
                "memory",
                op=f"Mapping {size_bytes} bytes of the front-end's memory",
                errno=getattr(e, "errno", None),
            ) from e
        return mapping, offset_bytes - start

    def _check_seals(self, what: str, fd: int) -> None:
        with contextlib.suppress(OSError):  # only memfds have seals
            if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                return
        if self._require_seals:
            raise GuestFault(
                "front-end",
                f"{what}: its file is not sealed against shrinking; "
                "use memory-backend-memfd, or drop require-seals",
            )
        log.info("%s: its file is not sealed: should it shrink, this process dies", what)


def _check_table(regions: Sequence[TableRegion]) -> None:
    for region in regions:
        if region.size_bytes == 0:
            raise GuestFault("front-end", f"Memory at {region.gpa:#x}: no bytes")
        for start in (region.gpa, region.uva, region.offset_bytes):
            if start + region.size_bytes > _ADDRESSES:
                raise GuestFault(
                    "front-end",
                    f"Memory at {region.gpa:#x}: {region.size_bytes:#x} bytes from {start:#x} on "
                    "are more than there are addresses",
                )
    for one, other in itertools.combinations(regions, 2):
        if _overlap(one.gpa, other.gpa, one, other) or _overlap(one.uva, other.uva, one, other):
            raise GuestFault("front-end", f"Memory at {one.gpa:#x} and at {other.gpa:#x} overlap")


def _overlap(a: int, b: int, one: TableRegion, other: TableRegion) -> bool:
    return a < b + other.size_bytes and b < a + one.size_bytes
