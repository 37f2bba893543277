"""The CMOS clock (MC146818 and its PC century register), always right and in UTC."""

from __future__ import annotations

import time
from collections.abc import Callable

from avmm.bus.region import Deferred

INDEX = 0
DATA = 1

SECONDS, MINUTES, HOURS = 0x00, 0x02, 0x04
DAY_OF_WEEK, DAY, MONTH, YEAR = 0x06, 0x07, 0x08, 0x09
REGISTER_A, REGISTER_B, REGISTER_C, REGISTER_D = 0x0A, 0x0B, 0x0C, 0x0D
CENTURY = 0x32

_CELLS = 128
_A_32768_HZ = 0x26
_B_24_HOURS = 1 << 1
_B_BINARY = 1 << 2
_D_VALID = 1 << 7
_PM = 1 << 7


class RtcCmos:
    """Ports 0x70 (index) and 0x71 (data).

    now: seconds since the epoch. Time registers follow it and writes to them are ignored: the
    guest's clock is the host's. The update-in-progress bit never shows, since a read takes one
    moment's time for the whole of it.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._index = 0
        self._cells = bytearray(_CELLS)
        self._cells[REGISTER_A] = _A_32768_HZ
        self._cells[REGISTER_B] = _B_24_HOURS
        self._cells[REGISTER_D] = _D_VALID

    def read(self, offset: int, size: int) -> int:
        """The selected register; the index port itself reads as all ones, as on a PC."""
        if offset == INDEX:
            return 0xFF
        number = self._index
        fields = self._fields()
        if number in fields:
            return fields[number]
        return self._cells[number]

    def write(self, offset: int, size: int, value: int) -> Deferred | None:
        """Select a register, or store into one that holds no time."""
        if offset == INDEX:
            self._index = value & (_CELLS - 1)  # bit 7 masks the NMI
        elif self._index not in (REGISTER_C, REGISTER_D):
            self._cells[self._index] = value & 0xFF
        return None

    def _fields(self) -> dict[int, int]:
        now = time.gmtime(self._now())
        mode = self._cells[REGISTER_B]

        def number(value: int) -> int:
            return value if mode & _B_BINARY else value // 10 << 4 | value % 10

        hours = number(now.tm_hour)
        if not mode & _B_24_HOURS:
            hours = number((now.tm_hour + 11) % 12 + 1) | (_PM if now.tm_hour >= 12 else 0)
        return {
            SECONDS: number(now.tm_sec),
            MINUTES: number(now.tm_min),
            HOURS: hours,
            DAY_OF_WEEK: number((now.tm_wday + 1) % 7 + 1),
            DAY: number(now.tm_mday),
            MONTH: number(now.tm_mon),
            YEAR: number(now.tm_year % 100),
            CENTURY: number(now.tm_year // 100),
        }
