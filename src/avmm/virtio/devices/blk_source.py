"""virtio-blk on a Python object: the same device and request parser as for files, with the event
loop in the place of the host's I/O."""

from __future__ import annotations

import asyncio
import errno
import logging
import struct
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import msgspec

from avmm.block.source import AnySource, SourceDisk, check_source, has
from avmm.config import Checked
from avmm.native import CData, ffi, lib
from avmm.virtio.devices.blk import BLK, BlkDevice, check_blk
from avmm.virtio.devtype import DeviceContext, DeviceType
from avmm.virtio.home import HomeChoice
from avmm.virtio.limit import RateLimit
from avmm.virtio.workers import Workers

if TYPE_CHECKING:
    Source = AnySource
else:
    Source = Any  # check_source() says better what is missing

log = logging.getLogger(__name__)

# struct av_blk_loop_op.
_Op = tuple[int, int, int, int, int, int]
_OP = struct.Struct("=QQQQII")

_READ, _WRITE, _SYNC = lib.AV_BLK_OP_READ, lib.AV_BLK_OP_WRITE, lib.AV_BLK_OP_SYNC
_PUNCH = lib.AV_BLK_OP_PUNCH


class AsyncDisk(Checked, frozen=True):
    """A disk of the guest whose bytes come from a Python object, as BlockSource describes it.

        Config(disks=[Disk("root.img"), AsyncDisk(RamDisk(64 * MIB))], ...)

    The object stays its maker's: it is neither opened nor closed here, and must not be attached
    twice at a time unless it is made for that.

    Raises ConfigError("disk") when the object lacks something, naming it.
    """

    source: Annotated[Source, msgspec.Meta(description="an object with async read, write, ...")]
    read_only: Annotated[
        bool, msgspec.Meta(description="the guest cannot write", extra={"option": "ro"})
    ] = False
    serial: Annotated[
        str | None, msgspec.Meta(description="serial number, at most 20 ASCII characters")
    ] = None
    queue_size: Annotated[
        int, msgspec.Meta(description="requests in flight at most, a power of two from 16 to 1024")
    ] = 256
    id: Annotated[str | None, msgspec.Meta(description="name in logs and statistics")] = None
    limit: Annotated[
        RateLimit | None, msgspec.Meta(description="rate limit", extra={"prefix": ""})
    ] = None

    device_type: ClassVar[DeviceType]
    engine: ClassVar[Literal["loop"]] = "loop"
    home: ClassVar[HomeChoice] = "loop"
    pinned: ClassVar[bool] = False
    queues: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_source(self.source, self.name, read_only=self.read_only)
        check_blk(self, self.name)

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"AsyncDisk {type(self.source).__name__}"


class SourceBlkDevice(BlkDevice):
    """The block device whose engine is the loop. Owns neither object nor file."""

    def __init__(self, config: AsyncDisk, disk: SourceDisk, context: DeviceContext) -> None:
        super().__init__(config, disk, context)
        (native,) = self._natives
        self._feed = Feed(config.source, native, context, depth=config.queue_size)
        context.stack.callback(context.homes.loop.after_turn(self._feed.take))

    def on_resume(self) -> None:
        """Requests are performed again."""
        self._feed.refusing = False

    async def on_cancel(self) -> None:
        """What the object has not done by now fails."""
        await self._feed.cancel()

    def counters(self) -> dict[str, int]:
        """As of every disk; failed: calls of the object that raised."""
        return super().counters() | {"failed": self._feed.failed}


class Feed:
    """Brings the operations of a native datapath to an object, and its answers back. Loop."""

    def __init__(
        self, source: AnySource, native: CData, context: DeviceContext, *, depth: int
    ) -> None:
        self.refusing = False
        self.failed = 0
        self._id = context.id
        self._guest_log = context.guest_log
        self._name = type(source).__name__
        self._native = native
        self._depth = depth
        self._ops = ffi.new("struct av_blk_loop_op[]", depth)
        self._buffer = memoryview(ffi.buffer(self._ops))
        self._workers: Workers[_Op] = Workers(
            context.loop, f"avmm-{context.id}", self._perform, context.guest_log
        )
        self._read: Any = getattr(source, "read", None)
        self._write: Any = getattr(source, "write", None)
        self._read_into: Any = getattr(source, "read_into", None)
        self._write_from: Any = getattr(source, "write_from", None)
        self._flush: Any = getattr(source, "flush", None)
        self._discard: Any = getattr(source, "discard", None)
        assert has(source, "size")

    def take(self) -> None:
        """After a turn of the home: begin what the datapath has submitted."""
        count = lib.av_blk_loop_take(self._native, self._ops, self._depth)
        if not count:
            return
        ops = _OP.iter_unpack(self._buffer[: count * _OP.size])
        if self.refusing:
            for op in ops:
                self._drop(op)
        else:
            self._workers.put(ops)

    async def cancel(self) -> None:
        """End all that is in flight, and refuse what comes until somebody says otherwise."""
        self.refusing = True
        await self._workers.cancel(self._drop)

    def _drop(self, op: _Op) -> None:
        lib.av_blk_loop_finish(self._native, op[0], -errno.ECANCELED)

    async def _perform(self, op: _Op) -> None:
        """One operation; whatever happens, it is finished once."""
        result = -errno.ECANCELED
        try:
            result = await self._call(op)
        except asyncio.CancelledError as e:
            if not self.refusing:  # cancelled by something that the object has waited for
                self._failure(op, e)
            raise
        except Exception as e:
            result = self._failure(op, e)
        finally:
            if not self._workers.abandoned:
                lib.av_blk_loop_finish(self._native, op[0], result)

    async def _call(self, op: _Op) -> int:
        """Let the object do it; bytes moved, or -errno."""
        token, offset, length, _, kind, _ = op
        if kind == _READ:
            if self._read_into is not None:
                await self._with_views(self._read_into, op)
                return length
            data = await self._read(offset, length)
            if len(data) != length:
                raise ValueError(f"it returned {len(data)} bytes")
            if not self._workers.abandoned:
                source = data if type(data) is bytes else ffi.from_buffer("uint8_t[]", data)
                lib.av_blk_loop_scatter(token, source, length)
            return length
        if kind == _WRITE:
            if self._write_from is not None:
                await self._with_views(self._write_from, op)
            else:
                await self._write(offset, _gather(op))
            return length
        if kind == _SYNC:
            if self._flush is not None:
                await self._flush()
            return 0
        if kind == _PUNCH and self._discard is not None:
            await self._discard(offset, length)
            return 0
        return -errno.EOPNOTSUPP

    async def _with_views(self, call: Any, op: _Op) -> None:
        views = _views(op)
        try:
            await call(op[1], views)
        finally:
            for view in views:
                view.release()

    def _failure(self, op: _Op, error: BaseException) -> int:
        """Count it and say so; what the datapath is told."""
        self.failed += 1
        _, offset, length, _, kind, _ = op
        self._guest_log.write(
            *(log, logging.WARNING, "%s: %s of %d bytes at %d: %s: %s: %s (failure %d)", self._id),
            *(_NAMES[kind], length, offset, self._name, type(error).__name__, error),
            self.failed,
            error=None if isinstance(error, OSError | NotImplementedError) else error,
        )
        return -errno.EOPNOTSUPP if isinstance(error, NotImplementedError) else -errno.EIO


_NAMES = {_READ: "read", _WRITE: "write", _SYNC: "flush"} | dict.fromkeys(
    (_PUNCH, lib.AV_BLK_OP_ZERO), "discard"
)


def _gather(op: _Op) -> bytes:
    """A write's data, copied: the guest can change its own at any time."""
    token, _, length, base, _, _ = op
    if base:
        return bytes(ffi.buffer(ffi.cast("char *", base), length))
    data = bytearray(length)
    lib.av_blk_loop_gather(token, ffi.from_buffer("uint8_t[]", data), length)
    return bytes(data)


def _views(op: _Op) -> list[memoryview]:
    token, _, _, _, kind, count = op
    segments = lib.av_blk_loop_segments(token)
    views = []
    for index in range(count):
        segment = segments[index]
        view = memoryview(ffi.buffer(segment.iov_base, segment.iov_len))
        views.append(view.toreadonly() if kind == _WRITE else view)
    return views


async def build(config: AsyncDisk, context: DeviceContext) -> SourceBlkDevice:
    """The device; it needs nothing of the host. Raises ConfigError, HostError."""
    disk = SourceDisk(config.source, read_only=config.read_only)
    return SourceBlkDevice(config, disk, context)


AsyncDisk.device_type = DeviceType(
    name=BLK.name,
    virtio_id=BLK.virtio_id,
    flag=BLK.flag,
    summary="a disk on a Python object",
    build=build,
    pci_class=BLK.pci_class,
)
