"""Homes and lanes: where the native work of queues runs, and how the loop controls it."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import msgspec

from avmm.errors import HostError
from avmm.loop import add_reader
from avmm.native import CData, ffi, lib
from avmm.virtio.queue import Queue

HomeChoice = Annotated[
    Literal["auto", "loop", "thread"],
    msgspec.Meta(
        description="where its queues are served: auto (the I/O threads, if there are any), "
        "loop (your event loop) or thread"
    ),
]


@dataclass(frozen=True, slots=True)
class HomeStatistics:
    """Counters of one home. turns: looks for events; runs: of lanes; sleeps, poll_hits and
    poll_ns: of its own thread's, and the time it looked for work in vain. vain_kicks: of the
    guest's, with nothing new in its rings; deaf: times a device did not listen to them for 4 ms,
    because there were too many."""

    name: str
    turns: int
    runs: int
    sleeps: int
    poll_hits: int
    poll_ns: int
    vain_kicks: int
    deaf: int


class Home:
    """One place where lanes run: the asyncio loop, or a native thread that never takes the GIL.

    Made, used and closed on the loop. poll_us: None for the loop; for a thread, how long it looks
    for new work before it sleeps.
    """

    def __init__(
        self, name: str, loop: asyncio.AbstractEventLoop, *, poll_us: int | None = None
    ) -> None:
        self.name = name
        self._loop = loop
        self._lanes: set[Lane] = set()
        self._after_turn: list[Callable[[], None]] = []
        self._again: asyncio.Handle | None = None
        error = ffi.new("int *")
        self.native: CData = lib.av_home_create(error)
        if not self.native:
            raise HostError("home", op=f"Home {name}", errno=error[0])
        self._fd = int(lib.av_home_fd(self.native))
        self._notice_fd = int(lib.av_home_notice_fd(self.native))
        self._final_statistics = HomeStatistics(name, 0, 0, 0, 0, 0, 0, 0)
        try:
            if poll_us is None:
                add_reader(loop, self._fd, self._turn)
            else:
                self._start_thread(poll_us)
            add_reader(loop, self._notice_fd, self._notices)
        except BaseException:
            self.close()
            raise

    def statistics(self) -> HomeStatistics:
        """Counters as of now, or as of close()."""
        if not self.native:
            return self._final_statistics
        s = ffi.new("struct av_home_stats *")
        lib.av_home_statistics(self.native, s)
        return HomeStatistics(
            name=self.name,
            turns=s.turns,
            runs=s.runs,
            sleeps=s.sleeps,
            poll_hits=s.poll_hits,
            poll_ns=s.poll_ns,
            vain_kicks=s.vain_kicks,
            deaf=s.deaf,
        )

    def close(self) -> None:
        """End it; every lane must be gone. Idempotent."""
        if self.native:
            self._final_statistics = self.statistics()
            self._loop.remove_reader(self._fd)
            self._loop.remove_reader(self._notice_fd)
            if self._again is not None:
                self._again.cancel()
            self._destroy()

    def add(self, lane: Lane) -> None:
        """Pass notices on to `lane` from now on."""
        self._lanes.add(lane)

    def remove(self, lane: Lane) -> None:
        """Undo add(). Idempotent."""
        self._lanes.discard(lane)

    def after_turn(self, work: Callable[[], None]) -> Callable[[], None]:
        """Call `work` after each turn that the loop takes: for what lanes leave to Python. What
        this returns undoes it."""
        self._after_turn.append(work)
        return lambda: self._after_turn.remove(work)

    def _start_thread(self, poll_us: int) -> None:
        result = lib.av_home_start_thread(self.native, poll_us * 1000)
        if result < 0:
            raise HostError("thread", op=f"Starting I/O thread {self.name}", errno=-result)

    def _turn(self) -> None:
        if self._again is not None:
            self._again.cancel()
            self._again = None
        if lib.av_home_turn(self.native):
            self._again = self._loop.call_soon(self._turn)
        for work in self._after_turn:
            work()

    def _notices(self) -> None:
        os.eventfd_read(self._notice_fd)
        for lane in tuple(self._lanes):
            lane.take_notice()

    def _destroy(self) -> None:
        lib.av_home_destroy(self.native)
        self.native = ffi.NULL


class Lane:
    """The loop's control of one native lane, which the device owns. Loop.

    queues: those whose chains it takes, in the order of its kick descriptors.
    enabled: whether it is to be started with its device.
    on_failure: called with -errno when it stopped by itself; -EPROTO is the guest's doing.
    on_news: called when the native device has something to tell.
    """

    def __init__(
        self,
        native: CData,
        home: Home,
        queues: Sequence[Queue],
        on_failure: Callable[[int], None],
        on_news: Callable[[], None],
    ) -> None:
        self.queues = tuple(queues)
        self.enabled = True
        self._native = native
        self._home = home
        self._on_failure = on_failure
        self._on_news = on_news
        self._rested = asyncio.Event()
        home.add(self)

    def start(self) -> None:
        """Take chains off the queues that are ready. Idempotent. Raises HostError("home")."""
        for index, queue in enumerate(self.queues):
            lib.av_lane_set_kick(self._native, index, queue.kick_fd if queue.ready else -1)
        result = lib.av_lane_start(self._native)
        if result < 0:
            raise HostError("home", op="Watching a queue", errno=-result)

    def hold(self) -> bool:
        """Take no more chains; whether it is at rest already."""
        return bool(lib.av_lane_hold(self._native))

    async def rest(self) -> None:
        """Take no more chains, and return when none is in flight. Idempotent.

        What it failed at is reported by then: a failure from before a reset, told after it, would
        be taken for one of the device's new life.
        """
        while True:
            self._rested.clear()
            if self.hold():
                self.take_notice()
                return
            await self._rested.wait()

    def abandoned(self) -> None:
        """The device has abandoned the native lane: who waits for its rest goes on."""
        self._rested.set()

    def take_notice(self) -> None:
        """The home has news of some of its lanes, maybe of this one."""
        notice = int(lib.av_lane_notice(self._native))
        if notice & lib.AV_LANE_RESTED:
            self._rested.set()
        if notice & lib.AV_LANE_NEWS:
            self._on_news()
        if notice & lib.AV_LANE_FAILED:
            self._on_failure(int(lib.av_lane_error(self._native)))

    def close(self) -> None:
        """Before the device destroys the native lane, which is at rest."""
        self._home.remove(self)


class Homes:
    """One machine's: the loop, and its I/O threads. Loop."""

    def __init__(self, loop: Home, threads: Sequence[Home]) -> None:
        self.all = (loop, *threads)
        self._loop = loop
        self._next_thread = itertools.cycle(threads or (loop,))

    @classmethod
    def create(cls, loop: asyncio.AbstractEventLoop, *, threads: int = 0, poll_us: int = 0) -> Self:
        """Raises HostError, and leaves nothing then."""
        homes: list[Home] = []
        try:
            homes.append(Home("loop", loop))
            for index in range(threads):
                homes.append(Home(f"io{index}", loop, poll_us=poll_us))
        except BaseException:
            for home in homes:
                home.close()
            raise
        return cls(homes[0], homes[1:])

    @property
    def loop(self) -> Home:
        """The event loop's, the only one where Python works for a lane."""
        return self._loop

    @property
    def threads(self) -> int:
        """How many I/O threads there are."""
        return len(self.all) - 1

    def pick(self, choice: HomeChoice) -> Home:
        """A home for one more lane: threads take turns."""
        return self._loop if choice == "loop" else next(self._next_thread)

    def statistics(self) -> tuple[HomeStatistics, ...]:
        """Of each, the loop first."""
        return tuple(home.statistics() for home in self.all)

    def close(self) -> None:
        """Close all; every lane must be gone. Idempotent."""
        for home in self.all:
            home.close()
