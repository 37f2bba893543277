"""virtio-blk: a disk on a file or block device (virtio 1.3 section 5.2)."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import struct
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import msgspec

from avmm.block.raw import RawDisk
from avmm.block.source import SourceDisk
from avmm.config import Checked
from avmm.errors import ConfigError, HostError
from avmm.native import CData, ffi, lib
from avmm.units import MIB, SECTOR_BYTES
from avmm.virtio import features
from avmm.virtio.device import VirtioDevice
from avmm.virtio.devices.blk_late import Held, hold, wait_late
from avmm.virtio.devtype import DeviceContext, DeviceType
from avmm.virtio.home import Home, HomeChoice
from avmm.virtio.limit import Limiter, RateLimit, attach
from avmm.virtio.queue import SIZE_MAX, SIZE_MIN, Queue, check_queue_size

if TYPE_CHECKING:
    from avmm.virtio.devices.blk_source import AsyncDisk

log = logging.getLogger(__name__)

QUEUES_MAX = 16
SEG_MAX = 126
ID_BYTES = 20
HANG_S = 30.0
"""How long the end of a device waits for storage that does not answer."""

_WORKERS = 4
"""Threads of a disk without io_uring, shared out among its queues."""

_COPY_MAX_BYTES = 64 * MIB
"""Of a disk whose data is copied on its way: what its queues hold together, but for the last
request that each has taken. Guests can ask for any amount, with the same memory again and again."""

_RANGES_MAX = 32
_RANGE_SECTORS_MAX = 0xFFFF_FFFF
_WRITEBACK_AT = 32

# struct virtio_blk_config up to write_zeroes_may_unmap and its padding (5.2.4).
_CONFIG = struct.Struct("<QII HBB I BBHI BBH IIIII B3x")

_ENGINES = {
    "io_uring": lib.AV_BLK_IO_URING,
    "threads": lib.AV_BLK_THREADS,
    "loop": lib.AV_BLK_LOOP,
}

_REFUSED = (errno.ENOSYS, errno.EPERM, errno.EACCES, errno.ENOMEM)
"""What io_uring_setup answers where it is switched off, filtered or out of locked memory."""


class Disk(Checked, frozen=True):
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
    pinned: Annotated[
        bool,
        msgspec.Meta(
            description="keep the guest's RAM in place for io_uring: less work a transfer, "
            "but all of it is taken at once"
        ),
    ] = False
    queues: Annotated[
        int | None,
        msgspec.Meta(description=f"queues, 1 to {QUEUES_MAX}; one for each vCPU by default"),
    ] = None
    queue_size: Annotated[
        int,
        msgspec.Meta(
            description=f"requests that a queue holds, a power of two from {SIZE_MIN} to {SIZE_MAX}"
        ),
    ] = 256
    home: HomeChoice = "auto"
    id: Annotated[str | None, msgspec.Meta(description="name in logs and statistics")] = None
    limit: Annotated[
        RateLimit | None, msgspec.Meta(description="rate limit", extra={"prefix": ""})
    ] = None

    device_type: ClassVar[DeviceType]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queues is not None and not 1 <= self.queues <= QUEUES_MAX:
            raise ConfigError(
                "disk", f"Disk {self.path}: queues={self.queues} is not in 1 to {QUEUES_MAX}"
            )
        check_blk(self, f"Disk {self.path}")


def check_blk(config: Disk | AsyncDisk, what: str) -> None:
    """Raises ConfigError for what no disk can have; `what` begins its message."""
    if config.serial is not None and not (
        config.serial.isascii() and len(config.serial) <= ID_BYTES
    ):
        raise ConfigError(
            "disk", f"{what}: serial {config.serial!r} is not ASCII of up to {ID_BYTES} bytes"
        )
    check_queue_size(config.queue_size, what)


class BlkDevice(VirtioDevice):
    """One disk. Owns the native datapath, not the image."""

    def __init__(
        self, config: Disk | AsyncDisk, disk: RawDisk | SourceDisk, context: DeviceContext
    ) -> None:
        offered = features.BLK_SEG_MAX | features.BLK_BLK_SIZE | features.BLK_FLUSH
        offered |= features.BLK_CONFIG_WCE | features.BLK_TOPOLOGY
        queues = config.queues or min(context.cpus, QUEUES_MAX)
        if queues > 1:
            offered |= features.BLK_MQ
        if disk.read_only:
            offered |= features.BLK_RO
        else:
            offered |= features.BLK_WRITE_ZEROES
            if disk.discards:
                offered |= features.BLK_DISCARD
        self._hung: list[CData] = []
        self._held: Held = ()
        context.stack.callback(self._wait_late)
        super().__init__(BLK, context, offered=offered, queue_sizes=(config.queue_size,) * queues)
        self.disk = disk
        self._op = f"I/O on disk {disk.path}"
        self._writeback = True
        self._topology = disk.topology()
        self._seg_max = _seg_max(config)
        self._pinned = config.pinned
        self.engine = ""
        self._limiter = Limiter(context.stack, self._op)
        self._natives: list[CData] = []
        self._lost = ffi.new("int *")
        for queue in self.queues:
            self._add_native(config, queue)
        self.set_limit(config.limit)
        self.set_config(self._config())

    def on_features(self, negotiated: int) -> None:
        """A driver that cannot ask for durability has it with each write (5.2.5.2, 5.2.6.2), but
        one with CONFIG_WCE may still say otherwise."""
        self._set_writeback(bool(negotiated & features.BLK_FLUSH))

    def on_resume(self) -> None:
        """A queue that was started may have other memory than before."""
        for queue, native in zip(self.queues, self._natives, strict=True):
            if self._pinned and queue.ready:
                self._pin(native)

    def on_queue_stop(self, index: int) -> None:
        """Its memory may go now, unless storage that hangs has it: for that, io_uring waited in
        kernels before 6.13."""
        if self._natives[index] not in self._hung:
            lib.av_blk_unpin(self._natives[index])

    def on_reset(self) -> None:
        """The cache is in write-back mode again."""
        self._set_writeback(True)

    def on_config_write(self, offset: int, data: bytes) -> None:
        """The driver may switch the cache mode (CONFIG_WCE)."""
        if offset == _WRITEBACK_AT and self.state.features & features.BLK_CONFIG_WCE:
            self._set_writeback(bool(data[0]))

    def on_news(self) -> None:
        """A flush failed: what it was for is lost, and no later one would tell."""
        reason = os.strerror(self._lost[0])
        log.error("%s: %s: flush: %s; none succeeds any more", self.context.id, self._op, reason)

    async def end(self) -> None:
        """As every device's; raises HostError("disk-hangs") when its storage does not answer, and
        then what is in flight is left to itself."""
        if self.disk.fd < 0:  # a Python object's, which has its own bound
            await super().end()
            return
        try:
            async with asyncio.timeout(HANG_S):
                await super().end()
            return
        except TimeoutError:
            self._hung = [native for native in self._natives if lib.av_blk_abandon(native)]
        if self._hung:
            self._held = hold(self.context.memory)
        for lane in self._lanes:
            lane.abandoned()
        await super().end()
        error = HostError(
            "disk-hangs",
            op=self._op,
            remedy=f"it did not end within {HANG_S:g} s; the guest's memory and the disk's "
            "lock are given back when it does",
        )
        log.error("%s: %s", self.context.id, error)
        raise error

    def resize(self) -> int:
        """Take over the image's present size and tell the driver; the size in bytes.

        Raises ConfigError("disk"), and then nothing changed.
        """
        self.disk.size_bytes = self.disk.measure()
        for native in self._natives:
            lib.av_blk_set_capacity(native, self.disk.size_bytes // SECTOR_BYTES)
        self.set_config(self._config())
        return self.disk.size_bytes

    @property
    def limit(self) -> RateLimit | None:
        """How much it may do."""
        return self._limiter.limit

    def set_limit(self, limit: RateLimit | None) -> None:
        """Limit what all queues do together, from now on. Raises HostError."""
        if limit is not None:
            native = self._limiter.native
            attach(self._natives, lambda blk: lib.av_blk_limit(blk, native), self._op)
        self._limiter.set(limit)

    def counters(self) -> dict[str, int]:
        """Requests by kind, bytes, errors, submissions to the engine, and waits for the limit."""
        stats = ffi.new("struct av_blk_stats *")
        total = dict.fromkeys(_COUNTERS, 0)
        for native in self._natives:
            lib.av_blk_statistics(native, stats)
            for name in _COUNTERS:
                total[name] += int(getattr(stats, name))
        return total

    def _add_native(self, config: Disk | AsyncDisk, queue: Queue) -> None:
        """The queue's own datapath, on a home of its own choice."""
        home = self.context.homes.pick(config.home)
        settings = _settings(config, self.disk, self.context.id, len(self.queues))
        # Direct I/O and disks of Python's have no page cache that could forget.
        is_cached = self.disk.fd >= 0 and self.disk.alignment_bytes == 1
        settings.lost = self._lost if is_cached else ffi.NULL
        settings.workers = max(1, _WORKERS // len(self.queues))
        self.engine, native = _create_native(config, settings, home, queue, self._op)
        self.context.stack.callback(self._destroy, native)
        self._natives.append(native)
        self.add_lane(lib.av_blk_lane(native), home, (queue,), self._op)

    def _pin(self, native: CData) -> None:
        result = lib.av_blk_pin(native, self.context.memory.native)
        if result < 0:
            raise HostError(
                "pinned",
                op=f"Pinning memory for disk {self.disk.path}",
                errno=-result,
                remedy="raise the limit of locked memory (ulimit -l), or drop pinned",
            )

    def _set_writeback(self, writeback: bool) -> None:
        self._writeback = writeback
        for native in self._natives:
            lib.av_blk_set_writeback(native, writeback)
        self.set_config(self._config(), notify=False)

    def _config(self) -> bytes:
        disk, topology = self.disk, self._topology
        block_bytes = topology.logical_bytes
        zero = 0 if disk.read_only else _RANGE_SECTORS_MAX
        discard = zero if disk.discards else 0
        return _CONFIG.pack(
            *(disk.size_bytes // SECTOR_BYTES, 0, self._seg_max),
            *(0, 0, 0, block_bytes),
            (topology.physical_bytes // block_bytes).bit_length() - 1,
            topology.offset_bytes // block_bytes,
            min(topology.min_io_bytes // block_bytes, 0xFFFF),
            topology.opt_io_bytes // block_bytes,
            *(self._writeback, 0, len(self.queues)),
            *(discard, _RANGES_MAX, topology.physical_bytes // SECTOR_BYTES),
            *(zero, _RANGES_MAX, 1),
        )

    def _destroy(self, native: CData) -> None:
        self._natives.remove(native)
        if native in self._hung:
            lib.av_blk_leave(native)
        else:
            lib.av_blk_destroy(native)

    def _wait_late(self) -> None:
        """The device is gone; what it could not give back is left to a thread."""
        if self._hung:
            assert isinstance(self.disk, RawDisk)
            wait_late(self._hung, self.disk.handed_on(), self._held)


_COUNTERS = (
    *("reads", "writes", "flushes", "discards", "write_zeroes", "get_ids", "unsupported"),
    *("errors", "read_bytes", "write_bytes", "batches", "bounced", "throttled"),
)


def _seg_max(config: Disk | AsyncDisk) -> int:
    """Data segments of a request, which fit into a queue beside header and status."""
    return min(SEG_MAX, config.queue_size - 2)


def _settings(config: Disk | AsyncDisk, disk: RawDisk | SourceDisk, id: str, queues: int) -> CData:
    """What is the same for all queues."""
    settings = ffi.new("struct av_blk_config *")
    settings.fd = disk.fd
    settings.capacity_sectors = disk.size_bytes // SECTOR_BYTES
    settings.read_only = disk.read_only
    settings.discard = disk.discards
    settings.write_zeroes = not disk.read_only
    settings.writeback = True
    settings.seg_max = _seg_max(config)
    settings.depth = config.queue_size
    settings.alignment_bytes = disk.alignment_bytes
    settings.copies = disk.copies
    settings.may_hang = disk.fd >= 0 and lib.av_file_may_hang(disk.fd)
    settings.copy_max_bytes = _COPY_MAX_BYTES // queues
    settings.id = (config.serial or id).encode()[:ID_BYTES].ljust(ID_BYTES, b"\0")
    return settings


def _create_native(
    config: Disk | AsyncDisk, settings: CData, home: Home, queue: Queue, op: str
) -> tuple[str, CData]:
    """The engine's name and the native datapath; io_uring where the host allows it."""
    engines = ("io_uring", "threads") if config.engine == "auto" else (config.engine,)
    error = ffi.new("int *")
    for engine in engines:
        settings.engine = _ENGINES[engine]
        native = lib.av_blk_create(settings, home.native, queue.ring, error)
        if native:
            return engine, native
        if error[0] not in _REFUSED:
            break
    raise HostError(
        "disk-engine",
        op=f"{engine} for {op}",
        errno=error[0],
        remedy="see kernel.io_uring_disabled, or use engine=threads",
    )


async def build(config: Disk, context: DeviceContext) -> BlkDevice:
    """Open and lock the image, then make the device. Raises ConfigError, HostError."""
    disk = RawDisk.open(
        config.path, read_only=config.read_only, direct=config.direct, opener=context.opener
    )
    context.stack.callback(disk.close)
    return BlkDevice(config, disk, context)


BLK = DeviceType(
    name="blk",
    virtio_id=2,
    flag="--disk",
    summary="a disk on a raw image file or block device, through io_uring or threads",
    build=build,
    pci_class=0x01_8000,
)
Disk.device_type = BLK
