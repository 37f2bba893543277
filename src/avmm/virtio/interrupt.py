"""A device's ways to interrupt its driver."""

from __future__ import annotations

from collections.abc import Callable

from avmm.errors import HostError
from avmm.native import CData, ffi, lib

USED_BUFFER = 1
CONFIG_CHANGE = 2
NO_FD = -1


class Interrupt:
    """Owns a native `struct av_interrupt`. The eventfd behind it is borrowed: KVM's irqfd, or
    whatever stands for it; NO_FD while the driver has given it no vector.

    Any thread, but for set_fd(). After close() nothing is raised any more, and the counters stay
    readable.

    on_fd_change: called on the loop with each new descriptor, for a data path that raises by
    itself, such as the kernel's vhost.
    """

    def __init__(self, fd: int = NO_FD) -> None:
        self.native: CData = lib.av_interrupt_create(fd)
        if not self.native:
            raise HostError("memory", op="Interrupt", errno=ffi.errno)
        self.fd = fd
        self.on_fd_change: list[Callable[[int], None]] = []
        self._final_count = 0

    def set_fd(self, fd: int) -> None:
        """Raise through another eventfd, or none. Loop. A raise under way on another thread may
        still reach the old one, which its owner must keep open until that cannot be."""
        if not self.native or fd == self.fd:
            return
        self.fd = fd
        lib.av_interrupt_set_fd(self.native, fd)
        for call in self.on_fd_change:
            call(fd)

    def raise_used(self) -> None:
        """Tell the driver that buffers were used (virtio 1.3 section 2.7.7); a native ring does
        this by itself, in its own time."""
        if self.native:
            lib.av_interrupt_raise(self.native, USED_BUFFER)

    def raise_config(self) -> None:
        """Tell the driver that the configuration changed (2.3)."""
        if self.native:
            lib.av_interrupt_raise(self.native, CONFIG_CHANGE)

    @property
    def status(self) -> int:
        """The bits the driver has not acknowledged."""
        return int(lib.av_interrupt_status(self.native)) if self.native else 0

    def acknowledge(self, bits: int) -> None:
        """Clear bits of the status."""
        if self.native:
            lib.av_interrupt_ack(self.native, bits)

    @property
    def count(self) -> int:
        """Interrupts raised so far; those that had nowhere to go are not."""
        return int(lib.av_interrupt_count(self.native)) if self.native else self._final_count

    def close(self) -> None:
        """Free it; no ring and no vCPU may use it any more. Idempotent."""
        if self.native:
            self._final_count = self.count
            lib.av_interrupt_destroy(self.native)
            self.native = ffi.NULL


class Interrupts:
    """One device's: `config` for changes of its configuration, and one for each queue.

    line_fd: all are the same object in front of this eventfd, as on virtio-mmio. Without it each
    is its own and begins with NO_FD, to be given a vector by the driver.

    line: that one object, whose status the driver reads before anything else; None without it.
    """

    def __init__(self, line_fd: int | None = None) -> None:
        self.config = Interrupt(NO_FD if line_fd is None else line_fd)
        self.line: Interrupt | None = self.config if line_fd is not None else None
        self._queues: list[Interrupt] = []

    def queue(self, index: int) -> Interrupt:
        """Queue `index`'s; made when it is first asked for. Loop."""
        if self.line is not None:
            return self.line
        while len(self._queues) <= index:
            self._queues.append(Interrupt())
        return self._queues[index]

    @property
    def status(self) -> int:
        """The bits the driver has not acknowledged, of all."""
        status = self.config.status
        for interrupt in self._queues:
            status |= interrupt.status
        return status

    def acknowledge(self, bits: int) -> None:
        """Clear bits of every status."""
        for interrupt in (self.config, *self._queues):
            interrupt.acknowledge(bits)

    @property
    def count(self) -> int:
        """Interrupts raised so far, all together."""
        return sum(interrupt.count for interrupt in (self.config, *self._queues))

    def close(self) -> None:
        """Close all. Idempotent."""
        for interrupt in (self.config, *self._queues):
            interrupt.close()
