"""virtio-blk: a disk on a file or block device (virtio 1.3 section 5.2)."""

from __future__ import annotations

import errno
import struct
from typing import Annotated, ClassVar, Literal

import msgspec

from avmm.block.raw import RawDisk
from avmm.errors import ConfigError, HostError
from avmm.native import CData, ffi, lib
from avmm.units import SECTOR_BYTES
from avmm.virtio import features
from avmm.virtio.device import VirtioDevice
from avmm.virtio.devtype import DeviceContext, DeviceType

QUEUE_SIZE = 256
SEG_MAX = 126
ID_BYTES = 20
_DEPTH = 256
_RANGES_MAX = 32
_RANGE_SECTORS_MAX = 0xFFFF_FFFF
_WRITEBACK_AT = 32

# struct virtio_blk_config up to write_zeroes_may_unmap and its padding (5.2.4).
_CONFIG = struct.Struct("<QII HBB I BBHI BBH IIIII B3x")

_REFUSED = (errno.ENOSYS, errno.EPERM, errno.EACCES, errno.ENOMEM)
"""What io_uring_setup answers where it is switched off, filtered or out of locked memory."""


class Disk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A disk of the guest; the first is /dev/vda."""

    path: Annotated[str, msgspec.Meta(description="raw image file or block device")]
    read_only: Annotated[
        bool, msgspec.Meta(description="the guest cannot write", extra={"option": "ro"})
    ] = False
    direct: Annotated[bool, msgspec.Meta(description="bypass the host's page cache")] = False
    serial: Annotated[
        str | None, msgspec.Meta(description="serial number, at most 20 ASCII characters")
    ] = None
    engine: Annotated[
        Literal["auto", "io_uring", "threads"],
        msgspec.Meta(description="how the host does the I/O: auto, io_uring or threads"),
    ] = "auto"
    id: Annotated[str | None, msgspec.Meta(description="name in logs and statistics")] = None

    device_type: ClassVar[DeviceType]

    def __post_init__(self) -> None:
        if self.serial is not None and not (self.serial.isascii() and len(self.serial) <= ID_BYTES):
            raise ConfigError(
                "disk",
                f"Disk {self.path}: serial {self.serial!r} is not ASCII of up to {ID_BYTES} bytes",
            )


class BlkDevice(VirtioDevice):
    """One disk. Owns the native datapath, not the image."""

    def __init__(self, config: Disk, disk: RawDisk, context: DeviceContext) -> None:
        offered = features.BLK_SEG_MAX | features.BLK_BLK_SIZE | features.BLK_FLUSH
        offered |= features.BLK_CONFIG_WCE
        if disk.read_only:
            offered |= features.BLK_RO
        else:
            offered |= features.BLK_DISCARD | features.BLK_WRITE_ZEROES
        super().__init__(BLK, context, offered=offered, queue_sizes=(QUEUE_SIZE,))
        self.disk = disk
        self._op = f"I/O on disk {disk.path}"
        self._writeback = True
        self.engine, self._native = _create_native(config, disk, context.id)
        context.stack.callback(self._destroy)
        for queue in self.queues:
            lib.av_blk_attach(self._native, queue.ring)
        self._event_fd = int(lib.av_blk_event_fd(self._native))
        self.set_config(self._config())

    def kick(self, index: int) -> bool:
        """Start the queue's requests."""
        queue = self.queues[index]
        result: int = lib.av_blk_kick(self._native, index, queue.kick_fd)
        if result < 0:
            raise self.failure(result, self._op)
        return result > 0

    def on_activate(self, negotiated: int) -> None:
        """Without FLUSH the driver cannot ask for durability, so each write is (5.2.5.2)."""
        if not negotiated & (features.BLK_FLUSH | features.BLK_CONFIG_WCE):
            self._set_writeback(False)

    def on_resume(self) -> None:
        """Take chains again."""
        lib.av_blk_hold(self._native, 0)
        self.pump.watch(self._event_fd, self._complete)

    async def on_quiesce(self) -> None:
        """Wait for what is in flight; its results still reach the rings."""
        lib.av_blk_hold(self._native, 1)
        while lib.av_blk_in_flight(self._native):
            await self._event()
            self._complete()

    def on_reset(self) -> None:
        """The cache is in write-back mode again."""
        self._set_writeback(True)

    def on_config_write(self, offset: int, data: bytes) -> None:
        """The driver may switch the cache mode (CONFIG_WCE)."""
        if offset == _WRITEBACK_AT and self.state.features & features.BLK_CONFIG_WCE:
            self._set_writeback(bool(data[0]))

    def resize(self) -> int:
        """Take over the image's present size and tell the driver; the size in bytes.

        Raises ConfigError("disk"), and then nothing changed.
        """
        self.disk.size_bytes = self.disk.measure()
        lib.av_blk_set_capacity(self._native, self.disk.size_bytes // SECTOR_BYTES)
        self.set_config(self._config())
        return self.disk.size_bytes

    def counters(self) -> dict[str, int]:
        """Requests by kind, bytes, errors, and submissions to the engine."""
        stats = ffi.new("struct av_blk_stats *")
        lib.av_blk_statistics(self._native, stats)
        return {name: int(getattr(stats, name)) for name in _COUNTERS}

    def _complete(self) -> bool:
        result: int = lib.av_blk_complete(self._native)
        if result < 0:
            raise self.failure(result, self._op)
        return result > 0

    async def _event(self) -> None:
        """Until the engine has finished something."""
        loop = self.context.loop
        event = loop.create_future()

        def ready() -> None:
            loop.remove_reader(self._event_fd)
            if not event.done():
                event.set_result(None)

        loop.add_reader(self._event_fd, ready)
        try:
            await event
        finally:
            loop.remove_reader(self._event_fd)

    def _set_writeback(self, writeback: bool) -> None:
        self._writeback = writeback
        lib.av_blk_set_writeback(self._native, writeback)
        self.set_config(self._config(), notify=False)

    def _config(self) -> bytes:
        disk = self.disk
        block_bytes = max(disk.alignment_bytes, SECTOR_BYTES)
        zero = 0 if disk.read_only else _RANGE_SECTORS_MAX
        return _CONFIG.pack(
            *(disk.size_bytes // SECTOR_BYTES, 0, SEG_MAX),
            *(0, 0, 0, block_bytes),
            *(0, 0, 0, 0),
            *(self._writeback, 0, len(self.queues)),
            *(zero, _RANGES_MAX, block_bytes // SECTOR_BYTES),
            *(zero, _RANGES_MAX, 1),
        )

    def _destroy(self) -> None:
        lib.av_blk_destroy(self._native)
        self._native = ffi.NULL


_COUNTERS = (
    *("reads", "writes", "flushes", "discards", "write_zeroes", "get_ids", "unsupported"),
    *("errors", "read_bytes", "write_bytes", "batches", "bounced"),
)


def _create_native(config: Disk, disk: RawDisk, id: str) -> tuple[str, CData]:
    """The engine's name and the native device; io_uring where the host allows it."""
    settings = ffi.new("struct av_blk_config *")
    settings.fd = disk.fd
    settings.capacity_sectors = disk.size_bytes // SECTOR_BYTES
    settings.read_only = disk.read_only
    settings.discard = settings.write_zeroes = not disk.read_only
    settings.writeback = True
    settings.seg_max = SEG_MAX
    settings.depth = _DEPTH
    settings.alignment_bytes = disk.alignment_bytes
    settings.id = (config.serial or id).encode()[:ID_BYTES].ljust(ID_BYTES, b"\0")
    engines = ("io_uring", "threads") if config.engine == "auto" else (config.engine,)
    error = ffi.new("int *")
    for engine in engines:
        kind = lib.AV_BLK_IO_URING if engine == "io_uring" else lib.AV_BLK_THREADS
        settings.engine = kind
        native = lib.av_blk_create(settings, error)
        if native:
            return engine, native
        if error[0] not in _REFUSED:
            break
    raise HostError(
        "disk-engine",
        op=f"{engine} for disk {disk.path}",
        errno=error[0],
        remedy="see kernel.io_uring_disabled, or use engine=threads",
    )


async def build(config: Disk, context: DeviceContext) -> BlkDevice:
    """Open and lock the image, then make the device. Raises ConfigError, HostError."""
    disk = RawDisk.open(config.path, read_only=config.read_only, direct=config.direct)
    context.stack.callback(disk.close)
    return BlkDevice(config, disk, context)


BLK = DeviceType(
    name="blk",
    virtio_id=2,
    flag="--disk",
    summary="a disk on a raw image file or block device, through io_uring or threads",
    build=build,
)
Disk.device_type = BLK
