"""Power states of a hardware-reduced ACPI machine: four one-byte registers of our own layout.

The FADT names the first three (ACPI 6.4 section 4.8.3), the generic event device in the DSDT
reads the fourth (5.6.9).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from avmm.bus.region import Deferred, Post

SLEEP_CONTROL = 0
SLEEP_STATUS = 1
RESET = 2
EVENT_SELECT = 3

SLEEP_ENABLE = 1 << 5
SLEEP_TYPE_SHIFT = 2
SLEEP_TYPE_MASK = 7
SLEEP_TYPE_S5 = 5
RESET_VALUE = 1
EVENT_POWER_BUTTON = 1 << 0


class AcpiPm:
    """on_sleep(type), on_reset(): called on the loop. event_irq_fd: the event device's irqfd,
    borrowed."""

    def __init__(
        self, on_sleep: Callable[[int], None], on_reset: Callable[[], None], event_irq_fd: int
    ) -> None:
        self._on_sleep = on_sleep
        self._on_reset = on_reset
        self._event_irq_fd = event_irq_fd
        self._lock = threading.Lock()  # the loop sets events, vCPUs take them
        self._events = 0

    def press_power_button(self) -> None:
        """Loop thread: raise the event; the guest decides what it does with it."""
        with self._lock:
            self._events |= EVENT_POWER_BUTTON
        os.eventfd_write(self._event_irq_fd, 1)

    def read(self, offset: int, size: int) -> int:
        """Only the event register holds anything; reading it clears it."""
        if offset != EVENT_SELECT:
            return 0
        with self._lock:
            events, self._events = self._events, 0
        return events

    def write(self, offset: int, size: int, value: int) -> Deferred | None:
        """Sleep and reset requests."""
        if offset == RESET and value == RESET_VALUE:
            return Post(self._on_reset)
        if offset == SLEEP_CONTROL and value & SLEEP_ENABLE:
            sleep_type = value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK
            return Post(lambda: self._on_sleep(sleep_type))
        return None
