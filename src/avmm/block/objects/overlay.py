"""Copy on write: a disk that begins as a base image, and keeps what differs in a file of its own.

The overlay file: a header, a bit for each cluster, the clusters themselves, each at its own place
in a file that is as large as the disk and, on the host's disk, only as large as what was written.

    0                 magic, version, cluster size, size of the base
    4096              the bits: set where the cluster is in this file and no longer the base's
    data              clusters

A bit is written after its cluster is durable, by flush(). After a crash the disk is as it was at
the last flush, or newer, a cluster at a time: what a disk promises.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self, TypeVar

from avmm.block.raw import RawDisk
from avmm.errors import ConfigError, HostError
from avmm.native import lib
from avmm.units import KIB

CLUSTER_BYTES = 64 * KIB
_MAGIC, _VERSION = b"avmm-cow", 1
_HEADER = struct.Struct("<8sIIQ")
_BITS_AT = 4 * KIB

T = TypeVar("T")


class OverlayDisk:
    """A disk over a base image, which is only read, and may be the base of many at once.

        async with OverlayDisk("base.img", "changes.cow") as disk:
            config = Config(disks=[AsyncDisk(disk)], ...)

    The overlay file is made when there is none; what it holds is kept from one machine to the
    next. The base must not change meanwhile, but by commit(). Files are read and written on
    threads, so the loop goes on; a call that is cancelled ends when its thread is done.

    Raises ConfigError for files that do not belong together, are in use or cannot be opened.
    """

    def __init__(self, base: str, overlay: str) -> None:
        self._base_path = base
        self._base = RawDisk.open(base, read_only=True, direct=False)
        try:
            self.size = self._base.size_bytes
            clusters = -(-self.size // CLUSTER_BYTES)
            bits_bytes = -(-clusters // 8)
            self._data_at = -(-(_BITS_AT + bits_bytes) // CLUSTER_BYTES) * CLUSTER_BYTES
            self._clusters = clusters
            _create(overlay, self.size, self._data_at)
            self._overlay = RawDisk.open(overlay, read_only=False, direct=False)
        except BaseException:
            self._base.close()
            raise
        try:
            self._bits = self._load(bits_bytes)
        except BaseException:
            self.close()
            raise
        self._dirty: set[int] = set()  # bytes of the bits that are not in the file
        self._allocating = asyncio.Lock()
        self._flushing = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self.flush()
        finally:
            self.close()

    @property
    def changed_bytes(self) -> int:
        """How much of the disk is no longer the base's, by the cluster."""
        return sum(byte.bit_count() for byte in self._bits) * CLUSTER_BYTES

    async def read_into(self, offset: int, views: Sequence[memoryview]) -> None:
        """From the overlay where it has the cluster, else from the base."""
        moves = []
        for view in views:
            for begin, end, own in self._runs(offset, offset + len(view)):
                moves.append((own, begin, view[begin - offset : end - offset]))
            offset += len(view)

        def read() -> None:
            for own, at, view in moves:
                fd, place = (self._overlay.fd, at + self._data_at) if own else (self._base.fd, at)
                _read_whole(fd, view, place)

        await _on_thread(read)

    async def write_from(self, offset: int, views: Sequence[memoryview]) -> None:
        """Into the overlay; a cluster that is written in part is copied from the base first."""
        size = sum(map(len, views))

        def write() -> None:
            _write_whole(self._overlay.fd, views, self._data_at + offset)

        if self._has_all(offset, offset + size):
            await _on_thread(write)
            return
        # One at a time: of two that change a cluster of the base's, one copies it.
        async with self._allocating:
            await self._copy_edges(offset, offset + size)
            await _on_thread(write)
            self._mark(offset, offset + size)

    async def discard(self, offset: int, size: int) -> None:
        """Zero the range: whole clusters take no room, neither here nor from the base."""
        end = offset + size

        def punch() -> None:
            _zero(self._overlay.fd, self._data_at + offset, size)

        async with self._allocating:
            await self._copy_edges(offset, end)
            await _on_thread(punch)
            self._mark(offset, end)

    async def flush(self) -> None:
        """Make durable what was written until now."""
        # One at a time: the next must not return before this one has written the bits they share.
        async with self._flushing:
            dirty, self._dirty = sorted(self._dirty), set()
            bits = [(index, bytes(self._bits[index : index + 1])) for index in dirty]

            def write() -> None:
                os.fdatasync(self._overlay.fd)
                for index, byte in bits:
                    os.pwrite(self._overlay.fd, byte, _BITS_AT + index)
                if bits:
                    os.fdatasync(self._overlay.fd)

            try:
                await _on_thread(write)
            except BaseException:
                self._dirty.update(dirty)
                raise

    async def commit(self) -> int:
        """Write the changes into the base image, and begin anew with none; how many bytes.

        Not while a machine has the disk, nor another one the base. After a crash it can be done
        again. Raises ConfigError when the base is in use or cannot be written.
        """
        async with self._allocating, self._flushing:
            runs = [run[:2] for run in self._runs(0, self.size) if run[2]]
            await _on_thread(lambda: self._copy_to_base(runs))
            self._bits = bytearray(len(self._bits))
            self._dirty.clear()
        return sum(end - begin for begin, end in runs)

    def close(self) -> None:
        """Close both files; nothing may be under way. What was not flushed may be lost in a crash
        of the host, and what was never flushed is. Idempotent."""
        self._overlay.close()
        self._base.close()

    def _load(self, bits_bytes: int) -> bytearray:
        """The bits of the overlay file, once it is clear that it belongs to this base."""
        header = os.pread(self._overlay.fd, _HEADER.size, 0).ljust(_HEADER.size, b"\0")
        magic, version, cluster_bytes, size = _HEADER.unpack(header)
        path = self._overlay.path
        if (magic, version) != (_MAGIC, _VERSION):
            raise ConfigError("overlay", f"Overlay {path} is not an overlay of version {_VERSION}")
        if cluster_bytes != CLUSTER_BYTES or size != self.size:
            raise ConfigError(
                "overlay",
                f"Overlay {path} is of a base of {size} bytes; {self._base_path} has {self.size}",
            )
        bits = bytearray(os.pread(self._overlay.fd, bits_bytes, _BITS_AT))
        if len(bits) != bits_bytes or self._overlay.size_bytes != self._data_at + self.size:
            raise ConfigError("overlay", f"Overlay {path} is cut short")
        return bits

    def _has(self, cluster: int) -> bool:
        return bool(self._bits[cluster >> 3] >> (cluster & 7) & 1)

    def _has_all(self, begin: int, end: int) -> bool:
        clusters = range(begin // CLUSTER_BYTES, -(-end // CLUSTER_BYTES))
        return all(self._has(cluster) for cluster in clusters)

    def _runs(self, begin: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """(begin, end, in the overlay) of stretches that are in one file."""
        while begin < end:
            cluster = begin // CLUSTER_BYTES
            own = self._has(cluster)
            cluster += 1
            while cluster * CLUSTER_BYTES < end and self._has(cluster) == own:
                cluster += 1
            stop = min(end, cluster * CLUSTER_BYTES)
            yield begin, stop, own
            begin = stop

    async def _copy_edges(self, begin: int, end: int) -> None:
        """Take over from the base the clusters that begin..end covers in part."""
        for edge in {begin // CLUSTER_BYTES, (end - 1) // CLUSTER_BYTES}:
            first = edge * CLUSTER_BYTES
            last = min(first + CLUSTER_BYTES, self.size)
            if not self._has(edge) and not (begin <= first and last <= end):
                await _on_thread(functools.partial(self._copy, first, last))
                self._mark(first, last)

    def _copy(self, begin: int, end: int) -> None:
        data = memoryview(bytearray(end - begin))
        _read_whole(self._base.fd, data, begin)
        _write_whole(self._overlay.fd, [data], self._data_at + begin)

    def _mark(self, begin: int, end: int) -> None:
        for cluster in range(begin // CLUSTER_BYTES, -(-end // CLUSTER_BYTES)):
            if not self._has(cluster):
                self._bits[cluster >> 3] |= 1 << (cluster & 7)
                self._dirty.add(cluster >> 3)

    def _copy_to_base(self, runs: Sequence[tuple[int, int]]) -> None:
        """The base is durable before the overlay forgets anything."""
        self._base.close()
        try:
            base = RawDisk.open(self._base_path, read_only=False, direct=False)
            try:
                for begin, end in runs:
                    for at in range(begin, end, CLUSTER_BYTES):
                        data = memoryview(bytearray(min(CLUSTER_BYTES, end - at)))
                        _read_whole(self._overlay.fd, data, self._data_at + at)
                        _write_whole(base.fd, [data], at)
                os.fdatasync(base.fd)
            finally:
                base.close()
        finally:
            self._base = RawDisk.open(self._base_path, read_only=True, direct=False)
        os.pwrite(self._overlay.fd, bytes(len(self._bits)), _BITS_AT)
        os.fdatasync(self._overlay.fd)
        # Only room, which is not worth zeroes where there are no holes.
        lib.av_file_punch(self._overlay.fd, self._data_at, self.size)


def _create(path: str, size: int, data_at: int) -> None:
    """An empty overlay, unless there is a file; one that is not finished leaves none."""
    if os.path.exists(path):
        return
    made = f"{path}.new"
    try:
        fd = os.open(made, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            os.truncate(fd, data_at + size)
            os.pwrite(fd, _HEADER.pack(_MAGIC, _VERSION, CLUSTER_BYTES, size), 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(made, path)
    except OSError as e:
        raise HostError("overlay", op="Making overlay", path=path, errno=e.errno) from e


def _read_whole(fd: int, view: memoryview, at: int) -> None:
    while len(view):
        count = os.preadv(fd, [view], at)
        if count == 0:
            raise OSError(f"the file ends at {at}")
        view, at = view[count:], at + count


def _write_whole(fd: int, views: Sequence[memoryview], at: int) -> None:
    for view in views:
        while len(view):
            count = os.pwritev(fd, [view], at)
            view, at = view[count:], at + count


def _zero(fd: int, at: int, size: int) -> None:
    """By a hole, where the file system knows them."""
    result = lib.av_file_punch(fd, at, size)
    if result == -errno.EOPNOTSUPP:
        for begin in range(0, size, CLUSTER_BYTES):
            zeroes = memoryview(bytes(min(CLUSTER_BYTES, size - begin)))
            _write_whole(fd, [zeroes], at + begin)
    elif result < 0:
        raise OSError(-result, os.strerror(-result))


async def _on_thread(work: Callable[[], T]) -> T:
    """Run `work` on a thread. When it is cancelled the thread is waited for all the same: it uses
    the caller's memory."""
    running = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():
            try:
                await asyncio.wait([running])
            except asyncio.CancelledError:
                continue
        if not running.cancelled():
            running.exception()  # seen
        raise
