"""A disk in memory."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

from avmm.errors import ConfigError
from avmm.units import PAGE_BYTES, SECTOR_BYTES


class RamDisk:
    """A disk whose bytes are this object's, and gone with it.

    Memory is taken by the page, where something was written; the guest's trim gives it back.
    content: what the disk holds at first. Raises ConfigError for a size that no disk can have.
    """

    def __init__(self, size: int, content: bytes = b"") -> None:
        if size <= 0 or size % SECTOR_BYTES or len(content) > size:
            raise ConfigError(
                "disk",
                f"RamDisk: size {size} is not a positive multiple of {SECTOR_BYTES} with room for "
                f"{len(content)} bytes",
            )
        self.size = size
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE)
        self._bytes = memoryview(self._map)
        self._bytes[: len(content)] = content

    @property
    def content(self) -> bytes:
        """All of it, copied."""
        return bytes(self._bytes)

    async def read_into(self, offset: int, views: Sequence[memoryview]) -> None:
        """Fill the views, one after the other."""
        for view in views:
            end = offset + len(view)
            view[:] = self._bytes[offset:end]
            offset = end

    async def write_from(self, offset: int, views: Sequence[memoryview]) -> None:
        """Take what the views hold, one after the other."""
        for view in views:
            end = offset + len(view)
            self._bytes[offset:end] = view
            offset = end

    async def discard(self, offset: int, size: int) -> None:
        """Zero the range; whole pages are given back."""
        end = offset + size
        first = min(end, -(-offset // PAGE_BYTES) * PAGE_BYTES)
        last = max(first, end // PAGE_BYTES * PAGE_BYTES)
        self._bytes[offset:first] = bytes(first - offset)
        if last > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)
        self._bytes[last:end] = bytes(end - last)
