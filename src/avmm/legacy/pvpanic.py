"""pvpanic: the guest's kernel says that it crashed (QEMU's ACPI device QEMU0001, one port)."""

from __future__ import annotations

from collections.abc import Callable

from avmm.bus.region import Deferred, Post

PANICKED = 1 << 0
CRASH_LOADED = 1 << 1
"""A crash kernel takes over: the guest goes on."""


class Pvpanic:
    """on_panic: called on the loop for each panic the guest reports."""

    def __init__(self, on_panic: Callable[[], None]) -> None:
        self._on_panic = on_panic

    def read(self, offset: int, size: int) -> int:
        """The events that are understood."""
        return PANICKED | CRASH_LOADED

    def write(self, offset: int, size: int, value: int) -> Deferred | None:
        """Events as bits."""
        return Post(self._on_panic) if value & PANICKED else None
