"""A device's way to interrupt its driver."""

from __future__ import annotations

from avmm.errors import HostError
from avmm.native import CData, ffi, lib

USED_BUFFER = 1
CONFIG_CHANGE = 2


class Interrupt:
    """Owns the native `struct av_interrupt`; irq_fd, the irqfd behind it, is borrowed.

    Any thread. After close() nothing is raised any more, and the counters stay readable.
    """

    def __init__(self, irq_fd: int) -> None:
        self.native: CData = lib.av_interrupt_create(irq_fd)
        if not self.native:
            raise HostError("memory", op="Interrupt", errno=ffi.errno)
        self._final_count = 0

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
        """Interrupts raised so far."""
        return int(lib.av_interrupt_count(self.native)) if self.native else self._final_count

    def close(self) -> None:
        """Free it; no ring and no vCPU may use it any more. Idempotent."""
        if self.native:
            self._final_count = self.count
            lib.av_interrupt_destroy(self.native)
            self.native = ffi.NULL
