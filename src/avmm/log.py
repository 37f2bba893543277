"""Logging: what a guest can make the host write, and set-up for programs."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Final

LINES_AT_ONCE: Final = 20
LINE_EVERY_S: Final = 10.0
LINE_MAX: Final = 4000
"""Characters, of a traceback as well."""

log = logging.getLogger(__name__)


def printable(text: str) -> str:
    """What somebody else said, for people: nothing that a terminal would obey, and no line of it
    looks like one of our own. LINE_MAX characters of it."""
    text = text[:LINE_MAX].replace("\n", "\n  ")
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )


class GuestLog:
    """Lines that a guest can cause, for all devices of one microVM: LINES_AT_ONCE, and after that
    one every LINE_EVERY_S. Of the rest there is a count. Loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.left_out = 0
        """How many lines were not written so far."""
        self._told = 0
        self._clock = clock
        self._room = float(LINES_AT_ONCE)
        self._at_s = clock()

    def write(
        self,
        logger: logging.Logger,
        level: int,
        message: str,
        *args: object,
        error: BaseException | None = None,
    ) -> None:
        """As logger.log(), unless there were too many. error: its traceback follows."""
        if not logger.isEnabledFor(level) or not self.admits():
            return
        text = message % args
        if error is not None:
            import traceback  # seldom needed, and slow to import

            text += "\n" + "".join(traceback.format_exception(error)).rstrip()
        if len(text) > LINE_MAX:
            text = f"{text[:LINE_MAX]}... ({len(text)} characters)"
        logger.log(level, "%s", text, stacklevel=2)

    def admits(self) -> bool:
        """Whether one more line may be written, which is then counted as such."""
        now_s = self._clock()
        self._room = min(LINES_AT_ONCE, self._room + (now_s - self._at_s) / LINE_EVERY_S)
        self._at_s = now_s
        if self._room < 1:
            self.left_out += 1
            return False
        self._room -= 1
        self.tell()
        return True

    def tell(self) -> None:
        """Write how many were left out, if that is news."""
        if self.left_out != self._told:
            log.warning("%d lines of a guest's doing were left out", self.left_out - self._told)
            self._told = self.left_out


def log_to_stderr(verbosity: int) -> None:
    """avmm's log on stderr: warnings at 0, information at 1, everything from 2 on."""
    level = {0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    logger = logging.getLogger("avmm")
    logger.setLevel(level)
    logger.addHandler(handler)
