"""The serial port, host side. The registers themselves are native/uart.c's."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from avmm.errors import HostError
from avmm.eventfd import new_eventfd
from avmm.native import CData, ffi, lib

_TAKE_BYTES = 65536


@dataclass(frozen=True, slots=True)
class SerialStatistics:
    """tx: from the guest, rx: read by the guest; tx_full: writes that waited for the host."""

    tx_bytes: int
    rx_bytes: int
    interrupts: int
    tx_full: int


class Serial16550:
    """A 16550A UART between a guest and the loop. Loop thread.

    irq_fd: the irqfd of its interrupt line, borrowed.
    event_fd: readable when take() has bytes, or when put() may continue.
    """

    def __init__(self, irq_fd: int) -> None:
        self.event_fd = new_eventfd()
        self.native: CData = lib.av_uart_create(irq_fd, self.event_fd)
        if not self.native:
            os.close(self.event_fd)
            raise HostError("memory", op="Serial port", errno=ffi.errno)
        self._room = ffi.new("uint8_t[]", _TAKE_BYTES)
        self._view = ffi.buffer(self._room)

    def acknowledge(self) -> None:
        """event_fd was seen; before take() and put()."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.event_fd)

    def take(self) -> bytes:
        """All bytes that the guest has sent, up to 64 KiB; b"" when there are none."""
        count = lib.av_uart_take(self.native, self._room, _TAKE_BYTES)
        return bytes(self._view[:count])

    def put(self, data: bytes | memoryview) -> int:
        """Offer bytes to the guest; how many were taken. Also lets the next burst begin, so
        it is called, with b"" if need be, whenever event_fd was readable."""
        taken: int = lib.av_uart_put(self.native, ffi.from_buffer(data), len(data))
        return taken

    def statistics(self) -> SerialStatistics:
        """Counters as of now."""
        stats = ffi.new("struct av_uart_stats *")
        lib.av_uart_statistics(self.native, stats)
        return SerialStatistics(stats.tx_bytes, stats.rx_bytes, stats.interrupts, stats.tx_full)

    def close(self) -> None:
        """Free it; no vCPU may run any more. Idempotent."""
        if self.native:
            lib.av_uart_destroy(self.native)
            self.native = ffi.NULL
            os.close(self.event_fd)
