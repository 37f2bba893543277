"""The device status field and its state machine (virtio 1.3 sections 2.1 and 3.1.1)."""

from __future__ import annotations

import enum
from collections.abc import Callable

from avmm.virtio import features

ACKNOWLEDGE = 1
DRIVER = 2
DRIVER_OK = 4
FEATURES_OK = 8
DEVICE_NEEDS_RESET = 64
FAILED = 128

_DRIVER_BITS = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED


class Transition(enum.Enum):
    """What a write of the status field asks of the device."""

    NONE = "none"
    RESET = "reset"
    ACTIVATE = "activate"


class DeviceState:
    """One device's status and features.

    Written on the loop, but for accept_features(), which vCPU threads call: vCPUs that race there
    hurt only their own guest. Any thread may read.

    offered: the device's feature bits, constant. on_status: called with each new status, for a
    transport that shows it without being asked.
    """

    def __init__(self, offered: int) -> None:
        self.offered = offered
        self.driver_features = 0
        self.on_status: Callable[[int], None] = lambda status: None
        self._status = 0

    @property
    def status(self) -> int:
        """The device status field."""
        return self._status

    @property
    def features(self) -> int:
        """The negotiated features; 0 before FEATURES_OK."""
        return self.driver_features if self.status & FEATURES_OK else 0

    @property
    def driver_ok(self) -> bool:
        """Whether the driver is set up, so that it may be interrupted (3.1.2)."""
        return bool(self.status & DRIVER_OK)

    @property
    def live(self) -> bool:
        """Whether the device may work on queues: the driver is set up and nothing is broken."""
        return self.status & (DRIVER_OK | DEVICE_NEEDS_RESET) == DRIVER_OK

    def accept_features(self, value: int) -> None:
        """Take the driver's features; ignored once they are fixed by FEATURES_OK."""
        if not self.status & FEATURES_OK:
            self.driver_features = value

    def write(self, value: int) -> Transition:
        """Take a status the driver wrote.

        FEATURES_OK stays clear when the features are not acceptable (2.2, 3.1.1 step 6), and
        DRIVER_OK without it or after FAILED. A driver cannot clear a bit but by a reset, and
        cannot set DEVICE_NEEDS_RESET. RESET changes nothing yet: the old status is what others
        read until the device is at rest and calls reset().
        """
        if value == 0:
            return Transition.RESET
        new = value & _DRIVER_BITS & ~self.status
        if new & FEATURES_OK and not self._acceptable():
            new &= ~FEATURES_OK
        after = self.status | new
        if not after & FEATURES_OK or after & FAILED:
            new &= ~DRIVER_OK
        self._set_status(self.status | new)
        return Transition.ACTIVATE if new & DRIVER_OK else Transition.NONE

    def needs_reset(self) -> bool:
        """Set DEVICE_NEEDS_RESET; whether it was not set before."""
        fresh = not self.status & DEVICE_NEEDS_RESET
        self._set_status(self.status | DEVICE_NEEDS_RESET)
        return fresh

    def reset(self) -> None:
        """Back to the state after power-on."""
        self.driver_features = 0
        self._set_status(0)

    def _set_status(self, status: int) -> None:
        self._status = status
        self.on_status(status)

    def _acceptable(self) -> bool:
        unknown = self.driver_features & ~self.offered
        return not unknown and bool(self.driver_features & features.VERSION_1)
