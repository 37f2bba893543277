"""The CMOS clock. The registers themselves are native/rtc.c's."""

from __future__ import annotations

from avmm.errors import HostError
from avmm.native import CData, ffi, lib


class RtcCmos:
    """Owns the native clock behind ports 0x70 (index) and 0x71 (data)."""

    def __init__(self) -> None:
        self.native: CData = lib.av_rtc_create()
        if not self.native:
            raise HostError("memory", op="Clock", errno=ffi.errno)

    def close(self) -> None:
        """Free it; no vCPU may run any more. Idempotent."""
        if self.native:
            lib.av_rtc_destroy(self.native)
            self.native = ffi.NULL
