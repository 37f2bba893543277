"""Tasks for what a device leaves to coroutines: many requests in flight, few tasks made."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Generic, TypeVar

from avmm.log import GuestLog

log = logging.getLogger(__name__)

CANCEL_S = 5.0
"""How long a coroutine that was cancelled may take to end."""

_IDLE_MAX = 64

T = TypeVar("T")


class Workers(Generic[T]):
    """Performs items, each in a coroutine, in the order of their coming as far as none waits.

    A new task costs more than a short request does, so a task performs one item after the other;
    while it waits for one, another task goes on with those behind it. Loop.

    perform: ends each item whatever happens, and raises nothing but CancelledError.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        name: str,
        perform: Callable[[T], Awaitable[None]],
        guest_log: GuestLog,
    ) -> None:
        self._loop = loop
        self._guest_log = guest_log
        self._name = name
        self._perform = perform
        self._waiting: deque[T] = deque()
        self._busy: dict[asyncio.Task[None], T] = {}
        self._idle: list[tuple[asyncio.Task[None], asyncio.Future[None]]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._spare: asyncio.Task[None] | None = None  # about to look at what waits
        self._abandoned: set[asyncio.Task[None]] = set()
        self._cancelling = 0
        self._rested = asyncio.Event()

    @property
    def in_flight(self) -> int:
        """Items that have not come to their end."""
        return len(self._waiting) + len(self._busy)

    @property
    def abandoned(self) -> bool:
        """For perform: whether its item was ended for it, and is not its own any more."""
        return bool(self._abandoned) and asyncio.current_task() in self._abandoned

    def put(self, items: Iterable[T]) -> None:
        """Perform these, soon."""
        self._waiting.extend(items)
        self._call_spare()

    async def rest(self) -> None:
        """Wait until nothing is in flight."""
        while self.in_flight:
            self._rested.clear()
            await self._rested.wait()

    async def cancel(self, drop: Callable[[T], None], *, timeout_s: float = CANCEL_S) -> None:
        """Cancel all that is in flight, and wait for its end; no task is left then.

        drop: ends an item that was never begun, or one whose coroutine goes on `timeout_s` after
        it was cancelled: that coroutine is left to itself.
        """
        while self._waiting:
            drop(self._waiting.popleft())
        tasks = self._tasks - self._abandoned
        for task in tasks:
            task.cancel()
        if not tasks:
            return
        self._cancelling += 1
        try:
            await asyncio.wait(tasks, timeout=timeout_s)
        finally:
            self._cancelling -= 1
        for task in tasks & self._busy.keys():
            text = "%s: a request goes on after it was cancelled; it is given up"
            self._guest_log.write(log, logging.ERROR, text, self._name)
            self._abandoned.add(task)
            drop(self._busy.pop(task))
        self._tell_rested()

    def _call_spare(self) -> None:
        """See that some task looks at what waits."""
        if self._spare is not None or not self._waiting:
            return
        while self._idle:
            task, wake = self._idle.pop()
            if not wake.done():
                wake.set_result(None)
                self._spare = task
                return
        task = self._loop.create_task(self._work(), name=self._name)
        self._spare = task
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def _work(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        waiting, busy, perform = self._waiting, self._busy, self._perform
        while True:
            self._spare = None
            while waiting:
                item = busy[task] = waiting.popleft()
                if waiting and self._spare is None:
                    self._call_spare()
                await perform(item)
                # Abandoned; or cancelled, and the coroutine has kept that to itself.
                if busy.pop(task, None) is None or self._cancelling:
                    return
            self._tell_rested()
            if len(self._idle) >= _IDLE_MAX:
                return
            wake = self._loop.create_future()
            self._idle.append((task, wake))
            await wake

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Of a task, in whatever way, also before it began."""
        self._tasks.discard(task)
        self._abandoned.discard(task)
        self._busy.pop(task, None)
        self._idle = [one for one in self._idle if one[0] is not task]
        if self._spare is task:
            self._spare = None
        self._call_spare()
        self._tell_rested()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._loop.call_exception_handler(
                {"message": f"{self._name}: a worker failed", "exception": error, "task": task}
            )

    def _tell_rested(self) -> None:
        if not self.in_flight:
            self._rested.set()
