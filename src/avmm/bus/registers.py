"""Registers that the C loop of a vCPU answers by itself, as far as it is told to."""

from __future__ import annotations

from avmm.errors import HostError
from avmm.native import CData, ffi, lib

_NOWHERE = (1 << 64) - 1


class Registers:
    """Owns a native `struct av_regs`. Sizes are 1 to 8 bytes; bytes past the end read as ones.

    What a guest's write may not do at once (watch(), hand_over()) comes as an exit at the
    block's address, to a Region on the bus. Any thread, but for close().
    """

    def __init__(self, size_bytes: int) -> None:
        self.native: CData = lib.av_regs_create(size_bytes)
        if not self.native:
            raise HostError("memory", op="Registers", errno=ffi.errno)
        self.size_bytes = size_bytes

    def define(self, offset: int, size: int, value: int, *, writable: int = 0) -> None:
        """Set bytes, and which of their bits a driver can write."""
        lib.av_regs_define(self.native, offset, size, value, writable)

    def watch(self, offset: int, size: int, bits: int) -> None:
        """The bits, among the writable, that only put() changes; others are watched no more."""
        lib.av_regs_watch(self.native, offset, size, bits)

    def hand_over(self, offset: int, size: int, *, reads: bool) -> None:
        """From now on make every write to these bytes an exit, and by `reads` every read."""
        lib.av_regs_hand_over(self.native, offset, size, reads)

    def get(self, offset: int, size: int) -> int:
        """Bytes as they are."""
        return int(lib.av_regs_get(self.native, offset, size))

    def put(self, offset: int, size: int, value: int) -> None:
        """A driver's write: changes the writable bits."""
        lib.av_regs_put(self.native, offset, size, value & (1 << 8 * size) - 1)

    def move(self, gpa: int | None) -> None:
        """Be at a guest physical address, or nowhere."""
        lib.av_regs_move(self.native, _NOWHERE if gpa is None else gpa)

    def close(self) -> None:
        """Free it; no vCPU may run any more. Idempotent."""
        if self.native:
            lib.av_regs_destroy(self.native)
            self.native = ffi.NULL
