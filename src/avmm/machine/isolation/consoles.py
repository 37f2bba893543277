"""A console of the guest on both sides: its output comes through a pipe, its input in records."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable

from avmm.console.console import Console
from avmm.console.streams import GuestReader, GuestWriter
from avmm.loop import add_reader
from avmm.machine.isolation.messages import Input, Line, Resize, Taken

PIECE_BYTES = 64 << 10
_INPUT_BYTES = 16 << 10
_LIMIT_BYTES = 16 << 10
_RUSH_BYTES = 1 << 20
"""A worker that stops has less left for a reader that holds the guest."""
_PIECES_AT_END = 32
"""More than there is in a pipe that nobody writes to any more."""


class RemoteConsole:
    """The program's side: a Console like any other. Owns the pipe's end. Loop.

    While a reader holds the guest nothing is taken out of the pipe, and what is behind it waits.
    """

    def __init__(
        self,
        name: str,
        fd: int,
        line: Line,
        *,
        scrollback_bytes: int,
        holds: bool,
        on_closed: Callable[[], None],
    ) -> None:
        self.console = Console(
            "console",
            self._put,
            scrollback_bytes=scrollback_bytes,
            release=self._watch if holds else None,
            resize=None if holds else self._resize,
        )
        self._name = name
        self._fd = fd
        self._line = line
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._watching = False
        self._rush_bytes = 0
        self._number = 0
        self._sent: tuple[int, int] | None = None
        self._sent_bytes = 0
        self._taken_bytes = 0
        self._watch()

    def rush(self) -> None:
        """The guest has ended: take what is left, whether or not a reader wants it now."""
        self._rush_bytes = _RUSH_BYTES
        self._watch()

    def finish(self) -> None:
        """Take what is in the pipe, and no more. Idempotent."""
        for _ in range(_PIECES_AT_END):
            if self._fd < 0 or not self._take():
                break
        self._close()

    def on_taken(self, number: int) -> None:
        """The guest has the piece of that number; of one that was given up nobody asks."""
        if number == self._number and self._sent is not None:
            self._taken_bytes = self._sent_bytes
            self.console.feed()

    def _put(self, data: memoryview) -> int:
        """Of the bytes at the head of the queue: see InputQueue. They are sent a piece at a time,
        and taken when the guest has them."""
        if self._sent == (id(data.obj), len(data)):
            taken, self._taken_bytes = self._taken_bytes, 0
            if taken:
                self._sent = None
                self._send(data[taken:])
            return taken
        self._send(data)
        return 0

    def _send(self, data: memoryview) -> None:
        piece = bytes(data[:_INPUT_BYTES])
        if piece:
            self._number += 1
            self._sent, self._sent_bytes = (id(data.obj), len(data)), len(piece)
            self._taken_bytes = 0
            self._line.say(Input(self._name, self._number, piece))

    def _resize(self, columns: int, rows: int) -> None:
        self._line.say(Resize(self._name, columns, rows))

    def _watch(self) -> None:
        if not self._watching and self._fd >= 0:
            self._watching = True
            add_reader(self._loop, self._fd, self._on_readable)

    def _unwatch(self) -> None:
        if self._watching:
            self._watching = False
            self._loop.remove_reader(self._fd)

    def _on_readable(self) -> None:
        if self.console.held and self._rush_bytes <= 0:
            self._unwatch()
        else:
            self._take()

    def _take(self) -> bool:
        """Whether there was something."""
        try:
            data = os.read(self._fd, PIECE_BYTES)
        except BlockingIOError:
            return False
        if data:
            self._rush_bytes -= len(data)
            self.console.receive(data)
        else:
            self._close()
        return bool(data)

    def _close(self) -> None:
        if self._fd >= 0:
            self._unwatch()
            os.close(self._fd)
            self._fd = -1
            self.console.close()
            self._on_closed()


class ConsoleRelay:
    """The worker's side: one more pair of streams on the console. Owns the pipe's end. Loop."""

    def __init__(self, name: str, console: Console, fd: int, line: Line) -> None:
        self._name = name
        self._console = console
        self._fd = fd
        self._line = line
        self._loop = asyncio.get_running_loop()
        self._streams: tuple[GuestReader, GuestWriter] = console.open(
            hold=console.can_hold, limit=_LIMIT_BYTES
        )
        self._input: asyncio.Queue[Input] = asyncio.Queue()

    def put(self, record: Input) -> None:
        """Bytes for the guest."""
        self._input.put_nowait(record)

    def resize(self, columns: int, rows: int) -> None:
        """The terminal's size."""
        self._console.resize(columns, rows)

    async def forward(self) -> None:
        """What the guest writes, until it has ended and all of it is in the pipe."""
        reader, _ = self._streams
        try:
            with contextlib.suppress(BrokenPipeError):
                while data := await reader.read(PIECE_BYTES):
                    await self._write(memoryview(data))
        finally:
            os.close(self._fd)

    async def feed(self) -> None:
        """What the guest reads; for ever."""
        _, writer = self._streams
        while True:
            record = await self._input.get()
            writer.write(record.data)
            with contextlib.suppress(ConnectionResetError):  # the guest ended: nobody waits
                await writer.drain()
                self._line.say(Taken(self._name, record.number))

    async def _write(self, data: memoryview) -> None:
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:
                writable = asyncio.Event()
                self._loop.add_writer(self._fd, writable.set)
                try:
                    await writable.wait()
                finally:
                    self._loop.remove_writer(self._fd)
