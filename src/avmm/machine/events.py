"""What happens to a microVM, as records that `async for` gives one after the other."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Self

from avmm.errors import ConfigError
from avmm.machine.reason import ExitReason

EVENTS_LIMIT = 256
"""How many events wait for a reader that does not come; then the oldest are lost."""


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events. at_s: when, in seconds since start() was called."""

    at_s: float


@dataclass(frozen=True, slots=True)
class Started(Event):
    """The guest was let go: its first instruction."""


@dataclass(frozen=True, slots=True)
class Paused(Event):
    """pause() is done: no vCPU runs and no device has work in flight."""


@dataclass(frozen=True, slots=True)
class Resumed(Event):
    """The guest goes on."""


@dataclass(frozen=True, slots=True)
class StopRequested(Event):
    """stop() pressed the power button. grace_s: what the guest has for it."""

    grace_s: float


@dataclass(frozen=True, slots=True)
class DriverReady(Event):
    """The guest's driver has set a device up (DRIVER_OK, virtio 1.3 section 3.1.1)."""

    device: str


@dataclass(frozen=True, slots=True)
class DriverGone(Event):
    """The guest reset a device that it had set up: its driver left, or begins anew."""

    device: str


@dataclass(frozen=True, slots=True)
class DeviceFault(Event):
    """The guest broke a device's specification; the device waits for a reset, the guest goes on.

    kind: of the GuestFault; detail: for people.
    """

    device: str
    kind: str
    detail: str


@dataclass(frozen=True, slots=True)
class LinkChanged(Event):
    """A NIC's cable was plugged in or out: by set_link(), or because its TAP is gone."""

    device: str
    up: bool


@dataclass(frozen=True, slots=True)
class ConsoleClosed(Event):
    """The serial console has all that the guest will ever write."""


@dataclass(frozen=True, slots=True)
class Ended(Event):
    """The guest has ended and everything is given back. The last event."""

    reason: ExitReason


@dataclass(frozen=True, slots=True)
class EventsLost(Event):
    """This reader was too slow: `count` events before the next were dropped for it alone."""

    count: int


class Events:
    """One reader's events from its making on: `async for event in vm.events()`.

    Ends behind Ended, or when start() fails. Several tasks may share one reader; each event goes
    to one of them. A reader that is dropped costs nothing any more.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: deque[Event] = deque()
        self._lost = 0
        self._closed = False
        self._news: set[asyncio.Future[None]] = set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._waiting:
            if self._closed:
                raise StopAsyncIteration
            news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._news.add(news)
            try:
                await news
            finally:
                self._news.discard(news)
        if self._lost:
            lost, self._lost = self._lost, 0
            return EventsLost(self._waiting[0].at_s, lost)
        return self._waiting.popleft()

    def _put(self, event: Event) -> None:
        if len(self._waiting) == self._limit:
            self._waiting.popleft()
            self._lost += 1
        self._waiting.append(event)
        self._wake()

    def _close(self) -> None:
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        for news in self._news:
            if not news.done():
                news.set_result(None)


class EventHub:
    """Hands one microVM's events to its readers. Loop."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._readers: weakref.WeakSet[Events] = weakref.WeakSet()
        self._closed = False

    def begin(self) -> None:
        """Count `at_s` from now on."""
        self._began = time.monotonic()

    def now(self) -> float:
        """The `at_s` of an event of this moment."""
        return time.monotonic() - self._began

    def reader(self, limit: int) -> Events:
        """A new reader of what is published from now on; of nothing after close().

        Raises ConfigError("events") unless it may hold at least one event.
        """
        if not isinstance(limit, int) or limit < 1:
            raise ConfigError("events", f"events: limit={limit!r} is not a number from 1 on")
        reader = Events(limit)
        if self._closed:
            reader._close()
        else:
            self._readers.add(reader)
        return reader

    def publish(self, event: Event) -> None:
        """To every reader; never waits for one."""
        for reader in tuple(self._readers):
            reader._put(event)

    def close(self) -> None:
        """No more will come. Idempotent."""
        self._closed = True
        for reader in tuple(self._readers):
            reader._close()
        self._readers.clear()
