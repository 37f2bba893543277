"""How running vCPUs are brought to rest and set going again.

A vCPU is *at rest* when it executes no guest instruction until it is let go: parked here, waiting
for the loop inside a CALL, or ended. A thread in a CALL has to count: it waits for the loop, and
the loop, pausing, would wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import threading
from collections.abc import Callable, Iterator, Sequence


class Mode(enum.Enum):
    """What the vCPUs of a VM should do."""

    RUN = "run"
    PAUSE = "pause"
    STOP = "stop"


class Gate:
    """Shared by one VM's vCPU threads and its loop.

    kicks: one function a vCPU, which makes its present or next KVM_RUN return.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, vcpus: int) -> None:
        self._loop = loop
        self._condition = threading.Condition()
        self._mode = Mode.PAUSE
        self._moving = vcpus
        self._maybe_at_rest = asyncio.Event()
        self.kicks: Sequence[Callable[[], None]] = ()

    @property
    def mode(self) -> Mode:
        """What was asked for last."""
        return self._mode

    def park(self) -> bool:
        """vCPU thread: wait here while paused. True to run the guest, False to end."""
        with self._condition:
            if self._mode is Mode.PAUSE:
                self._rest()
                while self._mode is Mode.PAUSE:
                    self._condition.wait()
                self._moving += 1
            return self._mode is Mode.RUN

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """vCPU thread: inside, this vCPU is at rest though its thread is not parked here."""
        with self._condition:
            self._rest()
        try:
            yield
        finally:
            with self._condition:
                self._moving += 1

    def ended(self) -> None:
        """vCPU thread: it will not run the guest again."""
        with self._condition:
            self._rest()

    def resume(self) -> None:
        """Loop: let parked vCPUs run. Nothing after stop()."""
        with self._condition:
            if self._mode is Mode.PAUSE:
                self._mode = Mode.RUN
                self._condition.notify_all()

    async def pause(self) -> None:
        """Loop: return when every vCPU is at rest, and keep them there until resume()."""
        with self._condition:
            if self._mode is Mode.RUN:
                self._mode = Mode.PAUSE
        self._kick()
        while True:
            # A wake-up may be left over from an earlier pause: only the count decides.
            self._maybe_at_rest.clear()
            with self._condition:
                if self._moving == 0:
                    return
            await self._maybe_at_rest.wait()

    def stop(self) -> None:
        """Loop: make every vCPU thread end soon, for good."""
        with self._condition:
            self._mode = Mode.STOP
            self._condition.notify_all()
        self._kick()

    def _kick(self) -> None:
        for kick in self.kicks:
            kick()

    def _rest(self) -> None:
        self._moving -= 1
        if self._moving == 0 and self._mode is not Mode.RUN:
            # A loop closed under the VM has nobody left who waits for this.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._maybe_at_rest.set)
