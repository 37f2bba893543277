"""The device status field and its state machine (virtio 1.3 sections 2.1 and 3.1.1)."""

from __future__ import annotations

import enum

from avmm.virtio import features

ACKNOWLEDGE = 1
DRIVER = 2
DRIVER_OK = 4
FEATURES_OK = 8
DEVICE_NEEDS_RESET = 64
FAILED = 128

_DRIVER_BITS = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED


class Transition(enum.Enum):
    """What a write of the status field asks the transport to do."""

    NONE = "none"
    RESET = "reset"
    ACTIVATE = "activate"


class DeviceState:
    """One device's status and features. Registers that several vCPUs write at once hurt only the
    guest that does so.

    offered: the device's feature bits, constant.
    """

    def __init__(self, offered: int) -> None:
        self.offered = offered
        self.driver_features = 0
        self.status = 0

    @property
    def features(self) -> int:
        """The negotiated features; 0 before FEATURES_OK."""
        return self.driver_features if self.status & FEATURES_OK else 0

    @property
    def running(self) -> bool:
        """Whether the driver may use the queues."""
        return bool(self.status & DRIVER_OK) and not self.status & FAILED

    def accept_features(self, value: int) -> None:
        """Take the driver's features; ignored once they are fixed by FEATURES_OK."""
        if not self.status & FEATURES_OK:
            self.driver_features = value

    def write(self, value: int) -> Transition:
        """Take a status the driver wrote.

        FEATURES_OK stays clear when the features are not acceptable (2.2, 3.1.1 step 6). A
        driver cannot clear a bit but by a reset, and cannot set DEVICE_NEEDS_RESET.
        """
        if value == 0:
            return Transition.RESET
        new = value & _DRIVER_BITS & ~self.status
        if new & FEATURES_OK and not self._acceptable():
            new &= ~(FEATURES_OK | DRIVER_OK)
        if new & DRIVER_OK and not (self.status | new) & FEATURES_OK:
            new &= ~DRIVER_OK
        self.status |= new
        return Transition.ACTIVATE if new & DRIVER_OK else Transition.NONE

    def needs_reset(self) -> bool:
        """Set DEVICE_NEEDS_RESET; whether it was not set before."""
        fresh = not self.status & DEVICE_NEEDS_RESET
        self.status |= DEVICE_NEEDS_RESET
        return fresh

    def reset(self) -> None:
        """Back to the state after power-on."""
        self.status = 0
        self.driver_features = 0

    def _acceptable(self) -> bool:
        unknown = self.driver_features & ~self.offered
        return not unknown and bool(self.driver_features & features.VERSION_1)
