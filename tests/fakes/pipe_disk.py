"""A disk whose I/O takes as long as a test wants."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from avmm.block.raw import RawDisk
from avmm.units import KIB, MIB
from avmm.vhost_user.server import VhostUserServer

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


@dataclass(frozen=True)
class Stuck:
    """A served disk that writes to a full pipe: drain() lets its writes end."""

    server: VhostUserServer
    read_fd: int
    write_fd: int

    def fill(self) -> None:
        os.set_blocking(self.write_fd, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(self.write_fd, bytes(4 * KIB))
        os.set_blocking(self.write_fd, True)

    def drain(self) -> None:
        os.set_blocking(self.read_fd, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.read(self.read_fd, MIB)
