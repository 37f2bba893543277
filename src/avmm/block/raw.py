"""Raw disks: a regular file or a block device, opened, checked and locked."""

from __future__ import annotations

import array
import contextlib
import copy
import errno
import fcntl
import mmap
import os
import stat
import struct
from dataclasses import dataclass
from typing import Self

from avmm.descriptors import Opener, open_path
from avmm.errors import ConfigError, HostError
from avmm.units import SECTOR_BYTES

_BLKGETSIZE64 = 0x80081272
_DIRECT_ALIGNMENT_MAX_BYTES = 4096
"""What every file system and disk that has direct I/O is content with."""

_PHYSICAL_MAX_BYTES = 4096
"""Of a file: a file system's larger units are good to know for I/O, but no sector of any disk."""

_BLKIOMIN, _BLKIOOPT, _BLKALIGNOFF, _BLKPBSZGET = 0x1278, 0x1279, 0x127A, 0x127B

_FLOCK = struct.Struct("hhqqi4x")
_F_OFD_SETLK = 37


@dataclass(frozen=True, slots=True)
class Topology:
    """How I/O is best shaped. logical_bytes: the unit of addresses; physical_bytes: the least that
    is written without reading first, a power of two of logical ones; offset_bytes: where the first
    physical block begins; min_io_bytes, opt_io_bytes: preferred sizes, 0 when the host has none."""

    logical_bytes: int
    physical_bytes: int
    offset_bytes: int
    min_io_bytes: int
    opt_io_bytes: int


class RawDisk:
    """An open disk image. Owns its descriptor; the lock goes with it.

    size_bytes: a multiple of 512. alignment_bytes: what direct I/O needs, 1 without it.
    """

    copies = False

    def __init__(self, fd: int, path: str, *, read_only: bool, direct: bool) -> None:
        self.fd = fd
        self.path = path
        self.read_only = read_only
        self.is_device = stat.S_ISBLK(os.fstat(fd).st_mode)
        self.alignment_bytes = self._alignment() if direct else 1
        self.size_bytes = self.measure()

    @classmethod
    def open(cls, path: str, *, read_only: bool, direct: bool, opener: Opener = open_path) -> Self:
        """Open `path`; one writer or many readers, by an advisory lock on the open file.

        Raises ConfigError("disk") for a path, size or use that cannot be, naming it; HostError
        when the host refuses for another reason.
        """
        fd = open_image(path, read_only=read_only, direct=direct, opener=opener)
        try:
            return cls(fd, path, read_only=read_only, direct=direct)
        except BaseException:
            os.close(fd)
            raise

    @property
    def discards(self) -> bool:
        """Whether trim is offered to the guest."""
        return not self.read_only

    def measure(self) -> int:
        """The size in bytes as it is now. Raises ConfigError("disk") for one no disk can have."""
        if self.is_device:
            size = array.array("Q", [0])
            fcntl.ioctl(self.fd, _BLKGETSIZE64, size, True)
            size_bytes = size[0]
        else:
            size_bytes = os.fstat(self.fd).st_size
        if size_bytes == 0 or size_bytes % SECTOR_BYTES:
            raise ConfigError(
                "disk",
                f"Disk {self.path}: {size_bytes} bytes is not a multiple of {SECTOR_BYTES}"
                if size_bytes
                else f"Disk {self.path} is empty; give it a size, for example with truncate",
            )
        return size_bytes

    def topology(self) -> Topology:
        """What the host says of its disk, or else of its file system."""
        logical = max(self.alignment_bytes, SECTOR_BYTES)
        status = os.fstat(self.fd)
        if not stat.S_ISBLK(status.st_mode):
            unit = max(status.st_blksize, logical)
            return Topology(logical, min(unit, _PHYSICAL_MAX_BYTES), 0, unit, 0)
        physical, minimum, optimal, offset = (
            _device_number(self.fd, request)
            for request in (_BLKPBSZGET, _BLKIOMIN, _BLKIOOPT, _BLKALIGNOFF)
        )
        # -1: made of disks whose blocks begin at different places, so none is right.
        return Topology(logical, max(physical, logical), max(offset, 0), minimum, optimal)

    def close(self) -> None:
        """Close and unlock; no I/O may be in flight. Idempotent."""
        if self.fd >= 0:
            # The lock would last as long as the open file, and io_uring lets go of a file that
            # was registered with it only some time after its ring is closed. A file system that
            # refuses loses it with the last of them.
            with contextlib.suppress(OSError):
                fcntl.fcntl(self.fd, _F_OFD_SETLK, _flock(fcntl.F_UNLCK))
            os.close(self.fd)
            self.fd = -1

    def handed_on(self) -> RawDisk:
        """The same disk for another owner, who closes it; this one is closed."""
        disk = copy.copy(self)
        self.fd = -1
        return disk

    def _alignment(self) -> int:
        """Found by trying, since most kernels do not say. It becomes the guest's block size, so
        it matters: a partition table made for blocks of 512 bytes means nothing to others."""
        with mmap.mmap(-1, 2 * _DIRECT_ALIGNMENT_MAX_BYTES) as buffer, memoryview(buffer) as view:
            size_bytes = SECTOR_BYTES
            while size_bytes < _DIRECT_ALIGNMENT_MAX_BYTES:
                try:
                    os.preadv(self.fd, [view[size_bytes : 2 * size_bytes]], 0)
                except OSError:  # EINVAL; and a disk that cannot be read tells the guest so
                    size_bytes *= 2
                else:
                    break
        return size_bytes


def image_flags(*, read_only: bool, direct: bool) -> int:
    """How a disk image is opened."""
    flags = os.O_RDONLY if read_only else os.O_RDWR
    return flags | os.O_DIRECT if direct else flags


def open_image(path: str, *, read_only: bool, direct: bool, opener: Opener = open_path) -> int:
    """A disk image, opened and locked, for the caller to close. Raises as RawDisk.open()."""
    try:
        fd = opener(path, image_flags(read_only=read_only, direct=direct))
    except OSError as e:
        raise _open_error(path, e, read_only=read_only, direct=direct) from e
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise ConfigError("disk", f"Disk {path} is neither a file nor a block device")
        _lock(fd, path, read_only)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _device_number(fd: int, request: int) -> int:
    value = array.array("i", [0])
    fcntl.ioctl(fd, request, value, True)
    return value[0]


def _lock(fd: int, path: str, read_only: bool) -> None:
    """An open-file-description lock on the whole file: it belongs to this descriptor, so two
    microVMs of one process exclude each other as well, and a killed process leaves none."""
    kind = fcntl.F_RDLCK if read_only else fcntl.F_WRLCK
    try:
        fcntl.fcntl(fd, _F_OFD_SETLK, _flock(kind))
    except OSError as e:
        if e.errno not in (errno.EAGAIN, errno.EACCES):
            raise HostError("disk-lock", op="lock", path=path, errno=e.errno) from e
        raise ConfigError(
            "disk-in-use",
            f"Disk {path} is in use by another microVM; several may share it only read-only",
        ) from e


def _flock(kind: int) -> bytes:
    """A struct flock for the whole file."""
    return _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0)


def _open_error(path: str, e: OSError, *, read_only: bool, direct: bool) -> Exception:
    reason = os.strerror(e.errno or 0)
    if e.errno == errno.EINVAL and direct:
        return ConfigError("disk", f"Disk {path}: its file system has no direct I/O; drop direct")
    if e.errno in (errno.EACCES, errno.EROFS, errno.EPERM) and not read_only:
        return ConfigError("disk", f"Disk {path}: {reason}; add ro to use it read-only")
    if e.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.ELOOP):
        return ConfigError("disk", f"Disk {path}: {reason}")
    return HostError("disk-open", op="open", path=path, errno=e.errno)
