"""The keyboard controller, for the one thing a microVM wants of it: reset."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from avmm.bus.region import Deferred, Post

STATUS_OUTPUT_FULL = 1 << 0
STATUS_SYSTEM = 1 << 2

COMMAND_READ_CONFIG = 0x20
COMMAND_WRITE_CONFIG = 0x60
COMMAND_DISABLE_AUX = 0xA7
COMMAND_TEST_AUX = 0xA9
COMMAND_SELF_TEST = 0xAA
COMMAND_TEST_KEYBOARD = 0xAB
COMMAND_RESET = 0xFE

_SELF_TEST_PASSED = 0x55
_PORT_TEST_FAILED = 0x01
"""Answered to port tests: no device is connected, so a driver's probe ends at once."""
_OUTPUT_BYTES = 16


class I8042:
    """Two one-byte regions, `data` (0x60) and `command` (0x64).

    on_reset: called on the loop when the guest pulses the processor's reset line.
    """

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset
        self._config = 0x30  # both ports disabled
        self._output: deque[int] = deque(maxlen=_OUTPUT_BYTES)
        self._config_follows = False
        self.data = _Data(self)
        self.command = _Command(self)

    def read_data(self) -> int:
        """The oldest answer; 0 when there is none."""
        try:
            return self._output.popleft()
        except IndexError:  # another vCPU may have taken it since the status was read
            return 0

    def write_data(self, value: int) -> None:
        """The parameter of a command; bytes for a keyboard go nowhere."""
        if self._config_follows:
            self._config_follows = False
            self._config = value

    def status(self) -> int:
        """The input buffer is always free: commands take effect at once."""
        return STATUS_SYSTEM | (STATUS_OUTPUT_FULL if self._output else 0)

    def write_command(self, value: int) -> Deferred | None:
        """A controller command."""
        if value == COMMAND_RESET:
            return Post(self._on_reset)
        if value == COMMAND_READ_CONFIG:
            self._output.append(self._config)
        elif value == COMMAND_WRITE_CONFIG:
            self._config_follows = True
        elif value == COMMAND_SELF_TEST:
            self._output.append(_SELF_TEST_PASSED)
        elif value in (COMMAND_TEST_AUX, COMMAND_TEST_KEYBOARD):
            self._output.append(_PORT_TEST_FAILED)
        return None


class _Data:
    def __init__(self, controller: I8042) -> None:
        self._controller = controller

    def read(self, offset: int, size: int) -> int:
        return self._controller.read_data()

    def write(self, offset: int, size: int, value: int) -> Deferred | None:
        self._controller.write_data(value & 0xFF)
        return None


class _Command:
    def __init__(self, controller: I8042) -> None:
        self._controller = controller

    def read(self, offset: int, size: int) -> int:
        return self._controller.status()

    def write(self, offset: int, size: int, value: int) -> Deferred | None:
        return self._controller.write_command(value & 0xFF)
