"""A virtqueue: where the driver put it, and the native ring that works on it."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from avmm.errors import ConfigError, GuestFault, HostError
from avmm.eventfd import new_eventfd
from avmm.mem.guest import GuestMemory
from avmm.native import CData, ffi, lib
from avmm.virtio.features import RING_PACKED
from avmm.virtio.interrupt import Interrupt

NO_FAULT = "none"

SIZE_MIN, SIZE_MAX = 16, 1024
"""Of a queue that moves data."""


def check_queue_size(size: int, what: str) -> None:
    """Raises ConfigError("queue-size") unless every driver can use a ring of that size."""
    if not SIZE_MIN <= size <= SIZE_MAX or size & (size - 1):
        raise ConfigError(
            "queue-size",
            f"{what}: queue_size={size} is not a power of two from {SIZE_MIN} to {SIZE_MAX}",
        )


@dataclass(frozen=True, slots=True)
class QueueStatistics:
    """Counters since the device was made. chains: taken; used: given back; suppressed: batches
    of used buffers for which the driver wanted no interrupt."""

    kicks: int
    chains: int
    used: int
    interrupts: int
    suppressed: int


class Queue:
    """One queue. The transport sets size and addresses (virtio 1.3 section 4.2.2) while it is not
    ready, on vCPU threads; the ring itself belongs to the loop.

    ready: the driver said that the queue is set up, and the ring has accepted it.
    kick_fd: an eventfd that is written when the driver notifies the queue; owned, unless another
    one was lent. interrupt: borrowed. inflight: where a ring that is resumed keeps what is in
    flight (native/vring.h), lent while the queue is ready; NULL: nowhere.
    """

    def __init__(
        self, index: int, max_size: int, memory: GuestMemory, interrupt: Interrupt
    ) -> None:
        self.index = index
        self.max_size = max_size
        self.interrupt = interrupt
        self.inflight: CData = ffi.NULL
        self._own_kick_fd = new_eventfd()
        self.kick_fd = self._own_kick_fd
        self.ring: CData = lib.av_vring_create(memory.native, interrupt.native)
        if not self.ring:
            os.close(self._own_kick_fd)
            raise HostError("memory", op="Virtqueue", errno=ffi.errno)
        self._final_statistics = QueueStatistics(0, 0, 0, 0, 0)
        self.forget()

    def forget(self) -> None:
        """Back to the state after power-on."""
        self.size = self.max_size
        self.desc_gpa = 0
        self.driver_gpa = 0
        self.device_gpa = 0
        self.ready = False

    def start(self, features: int, base: int | None = None) -> None:
        """Begin where the driver put the ring: with an empty one, or where another left off.

        features: the negotiated ones. base: another's `base`, in vhost-user's encoding.
        Raises GuestFault("queue-size" | "queue-address").
        """
        size = self.size
        packed = features & RING_PACKED
        if not 0 < size <= self.max_size or (size & (size - 1) and not packed):
            what = "from 1" if packed else "a power of two"
            raise GuestFault(
                "queue-size", f"Queue {self.index}: size {size} is not {what} to {self.max_size}"
            )
        setup = ffi.new("struct av_vring_setup *")
        setup.desc_gpa, setup.driver_gpa = self.desc_gpa, self.driver_gpa
        setup.device_gpa = self.device_gpa
        setup.features, setup.size = features, size
        if base is not None:
            setup.resume, setup.base, setup.inflight = True, base, self.inflight
        if lib.av_vring_start(self.ring, setup) < 0:
            begin = "" if base is None else f" from {base:#x} on"
            raise GuestFault(
                "queue-address",
                f"Queue {self.index}: {self.desc_gpa:#x}, {self.driver_gpa:#x}, "
                f"{self.device_gpa:#x}{begin}: unaligned or outside memory or the ring",
            )

    def stop(self) -> None:
        """Stop using the driver's memory; nothing may be in flight."""
        lib.av_vring_stop(self.ring)

    @property
    def base(self) -> int:
        """Where the ring stands, in vhost-user's encoding; also after stop()."""
        return int(lib.av_vring_base(self.ring))

    def lend_kick(self, fd: int) -> None:
        """Be kicked by somebody else's eventfd, which does not block; the queue's own again when
        negative. At rest."""
        self.kick_fd = fd if fd >= 0 else self._own_kick_fd

    def notify(self) -> None:
        """As if the driver had written the notification. Any thread."""
        with contextlib.suppress(BlockingIOError):  # full: it says so already
            os.eventfd_write(self.kick_fd, 1)

    def take_kick(self) -> None:
        """Drain kick_fd, for a device that has no native work to do it."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.kick_fd)

    @property
    def fault(self) -> str:
        """The kind of GuestFault that the ring is dead of, or NO_FAULT."""
        name = ffi.string(lib.av_fault_name(lib.av_vring_fault(self.ring)))
        return bytes(name).decode()

    def statistics(self) -> QueueStatistics:
        """Counters as of now, or as of close()."""
        if not self.ring:
            return self._final_statistics
        s = ffi.new("struct av_vring_stats *")
        lib.av_vring_statistics(self.ring, s)
        return QueueStatistics(s.kicks, s.chains, s.used, s.interrupts, s.suppressed)

    def close(self) -> None:
        """Free it. Idempotent."""
        if self.ring:
            self._final_statistics = self.statistics()
            lib.av_vring_destroy(self.ring)
            self.ring = ffi.NULL
            os.close(self._own_kick_fd)
