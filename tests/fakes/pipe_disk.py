"""A disk whose I/O takes as long as a test wants."""

from __future__ import annotations

from avmm.block.raw import RawDisk
from avmm.units import MIB

SIZE_BYTES = 4 * MIB


class PipeDisk(RawDisk):
    """Its bytes come and go through a pipe, which may be full."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.path = "pipe"
        self.read_only = False
        self.is_device = False
        self.alignment_bytes = 1
        self.size_bytes = SIZE_BYTES
