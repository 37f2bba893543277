"""Binds descriptors to the work that Python does for them on the asyncio loop.

Work is bounded a turn: a callback that returns True has more to do and is called again after
everything else that is ready had its turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from avmm.loop import add_reader

Work = Callable[[], bool]


class Pump:
    """One device's watched descriptors. Loop thread.

    on_error: called with what a piece of work raised; the pump itself goes on.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, on_error: Callable[[Exception], None]
    ) -> None:
        self._loop = loop
        self._on_error = on_error
        self._work: dict[int, Work] = {}
        self._again: dict[int, asyncio.Handle] = {}
        self._resting: dict[int, asyncio.Handle] = {}

    def watch(self, fd: int, work: Work) -> None:
        """Call `work` whenever `fd` is readable, until unwatch(). Idempotent. Raises HostError."""
        if fd not in self._work:
            add_reader(self._loop, fd, self._run, fd)
            self._work[fd] = work

    def unwatch(self, fd: int) -> None:
        """Undo watch(); before the descriptor is closed. Idempotent."""
        if self._work.pop(fd, None) is not None:
            if resting := self._resting.pop(fd, None):
                resting.cancel()
            else:
                self._loop.remove_reader(fd)
        if again := self._again.pop(fd, None):
            again.cancel()

    def rest(self, fd: int, rest_s: float) -> None:
        """Do not look at `fd` for so long, and then do its work whether it is readable or not.
        Nothing when it is not watched, or rests already."""
        if fd in self._work and fd not in self._resting:
            self._loop.remove_reader(fd)
            self._resting[fd] = self._loop.call_later(rest_s, self._wake, fd)

    def stop(self) -> None:
        """Watch nothing any more. Idempotent."""
        for fd in tuple(self._work):
            self.unwatch(fd)

    def _wake(self, fd: int) -> None:
        del self._resting[fd]
        work = self._work.pop(fd)
        try:
            self.watch(fd, work)
        except Exception as e:
            self._on_error(e)
            return
        self._run(fd)

    def _run(self, fd: int) -> None:
        if self._again and (again := self._again.pop(fd, None)):
            again.cancel()
        work = self._work.get(fd)
        if work is None:  # stopped by what ran before it in the same turn
            return
        try:
            more = work()
        except Exception as e:
            self._on_error(e)
            return
        if more and fd in self._work:
            self._again[fd] = self._loop.call_soon(self._run, fd)
