"""Kicks that bring no work, where Python is kicked (native/kicks.h)."""

from __future__ import annotations

import time

from avmm.native import CData, ffi, lib

_NS = 1_000_000_000


class Kicks:
    """How often a guest may wake the loop for nothing. Loop."""

    def __init__(self) -> None:
        self._native: CData = ffi.new("struct av_kicks *")
        lib.av_kicks_init(self._native, 0, 0, 0)

    def judge(self, worked: bool) -> float:
        """The guest kicked, and there was work or none: for how many seconds it is not to be
        listened to; 0.0: go on."""
        if worked:
            lib.av_kicks_worked(self._native, 1)
            return 0.0
        return float(lib.av_kicks_vain(self._native, time.monotonic_ns()) / _NS)
