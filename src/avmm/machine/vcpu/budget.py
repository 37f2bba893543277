"""What a guest's exits may take of the time that all in the process share (native/budget.h)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from avmm.errors import HostError
from avmm.native import CData, ffi, lib

BURST_NS = 100_000_000
"""What may be spent at once after a rest: a kernel's start takes less."""

TURN_NS = 10_000
"""What a turn of the loop takes beside the work that it was for: it wakes, looks and sleeps."""

_PPM = 1_000_000


class Budget:
    """One VM's: work on its loop is charged here, that of its vCPU threads by native/vcpu.c.

    share: of one processor's time, at most 1. blocked_ns: for how long, all together, the loop was
    blocked by what it asked the kernel to do for this VM.
    """

    def __init__(self, share: float, blocked_ns: Callable[[], int] = lambda: 0) -> None:
        self._blocked_ns = blocked_ns
        self.native: CData = lib.av_budget_create(
            max(1, round(share * _PPM)), BURST_NS, time.monotonic_ns()
        )
        if not self.native:
            raise HostError("memory", op="Exit budget", errno=ffi.errno)

    @contextmanager
    def charged(self) -> Iterator[None]:
        """Charge what is done inside on the loop, and a turn of it.

        Not the time that passes: each native call in there gives the GIL away, and a thread of the
        program that computes in Python has it back after 5 ms, which is not the guest's doing.
        """
        began = time.thread_time_ns() + self._blocked_ns()
        try:
            yield
        finally:
            if self.native:  # what a vCPU posted last may come after its end
                spent_ns = time.thread_time_ns() + self._blocked_ns() - began + TURN_NS
                lib.av_budget_spend(self.native, spent_ns, time.monotonic_ns())

    def close(self) -> None:
        """After the vCPUs ended. Idempotent."""
        if self.native:
            lib.av_budget_destroy(self.native)
            self.native = ffi.NULL
