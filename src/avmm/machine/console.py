"""The serial port and its console."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager

from avmm.console.console import SCROLLBACK_BYTES, Console
from avmm.errors import HostError
from avmm.kicks import Kicks
from avmm.legacy.serial16550 import Serial16550
from avmm.loop import add_reader

_WORTH_BYTES = 4096
"""So many at once are worth a turn of the loop."""


class SerialConsole:
    """Moves bytes between a serial port and the console that it serves. Loop thread.

    charged: made anew and entered whenever the guest's output made the loop work.
    """

    def __init__(
        self,
        serial: Serial16550,
        scrollback_bytes: int = SCROLLBACK_BYTES,
        charged: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self._serial = serial
        self._charged = charged
        self._kicks = Kicks()
        self._sent_bytes = 0
        self._read_bytes = 0
        self._resting: asyncio.Handle | None = None
        self.console = Console(
            "console",
            self._put,
            scrollback_bytes=scrollback_bytes,
            release=self._release,
        )
        self._released = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin to listen; needs a running loop. Raises HostError."""
        self._loop = asyncio.get_running_loop()
        add_reader(self._loop, self._serial.event_fd, self._on_event)

    def close(self) -> None:
        """Take what is left and tell all readers that no more will come. Idempotent."""
        if self._loop is None or self.console.closed:
            return
        if self._resting is not None:
            self._resting.cancel()
        else:
            self._loop.remove_reader(self._serial.event_fd)
        while chunk := self._serial.take():
            self.console.receive(chunk)
        self.console.close()
        self._released.set()

    def _on_event(self) -> None:
        """Bytes one at a time may keep a loop busy like kicks in vain: a guest that prints by the
        byte is drained now and then, while its ring has room."""
        sent, read = self._sent_bytes, self._read_bytes
        with self._charged():
            self.drain()
        self._read_bytes = self._serial.statistics().rx_bytes
        rest_s = self._kicks.judge(
            self._sent_bytes - sent >= _WORTH_BYTES or self._read_bytes != read
        )
        if rest_s and self._loop is not None:
            self._loop.remove_reader(self._serial.event_fd)
            self._resting = self._loop.call_later(rest_s, self._listen, self._loop, rest_s)

    def _listen(self, loop: asyncio.AbstractEventLoop, rest_s: float) -> None:
        try:
            add_reader(loop, self._serial.event_fd, self._on_event)
        except HostError:  # no room for a watch now: look again like this until there is
            self._resting = loop.call_later(rest_s, self._listen, loop, rest_s)
            self.drain()
        else:
            self._resting = None
            self._on_event()

    def drain(self) -> None:
        """Take what the guest wrote and give it what it may read next."""
        self._serial.acknowledge()
        while not self.console.held and (chunk := self._serial.take()):
            self._sent_bytes += len(chunk)
            self.console.receive(chunk)
        self.console.feed()
        self._serial.put(b"")

    def make_room(self) -> Awaitable[None] | None:
        """The transmit ring is full and a vCPU waits: drain, as soon as readers let us."""
        self.drain()
        return self._wait() if self.console.held else None

    def _put(self, data: bytes | memoryview) -> int:
        """To the guest. What it answers is work that the host asked for."""
        taken = self._serial.put(data)
        if taken:
            self._kicks.judge(True)
        return taken

    async def _wait(self) -> None:
        while self.console.held:
            self._released.clear()
            await self._released.wait()

    def _release(self) -> None:
        self.drain()
        self._released.set()
