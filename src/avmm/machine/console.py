"""The serial port and its console."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager

from avmm.console.console import SCROLLBACK_BYTES, Console
from avmm.legacy.serial16550 import Serial16550
from avmm.loop import add_reader


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
        self.console = Console(
            "console",
            serial.put,
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
        self._loop.remove_reader(self._serial.event_fd)
        while chunk := self._serial.take():
            self.console.receive(chunk)
        self.console.close()
        self._released.set()

    def _on_event(self) -> None:
        with self._charged():
            self.drain()

    def drain(self) -> None:
        """Take what the guest wrote and give it what it may read next."""
        self._serial.acknowledge()
        while not self.console.held and (chunk := self._serial.take()):
            self.console.receive(chunk)
        self.console.feed()
        self._serial.put(b"")

    def make_room(self) -> Awaitable[None] | None:
        """The transmit ring is full and a vCPU waits: drain, as soon as readers let us."""
        self.drain()
        return self._wait() if self.console.held else None

    async def _wait(self) -> None:
        while self.console.held:
            self._released.clear()
            await self._released.wait()

    def _release(self) -> None:
        self.drain()
        self._released.set()
