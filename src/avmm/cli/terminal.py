"""The user's terminal, or whatever else stdin and stdout are, as the guest's console."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import termios
import tty
from collections.abc import Callable, Iterator

from avmm.machine.console import Console

ESCAPE_KEY = b"\x1d"
ESCAPE_NAME = "Ctrl-]"

_READ_BYTES = 65536


@contextlib.contextmanager
def raw_mode(fd: int) -> Iterator[None]:
    """A terminal without line editing and signals keys; as it was before, on every way out."""
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSANOW)
        yield
    finally:
        # TCSADRAIN, so that what is still to be shown is shown under the old rules as well.
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


class Output:
    """Bytes to stdout. Blocks when its reader is slow, and then so does the guest's console: that
    is the only flow control a serial line has."""

    def __init__(self, fd: int, on_closed: Callable[[], None]) -> None:
        self._fd = fd
        self._on_closed = on_closed
        self._closed = False

    def write(self, data: bytes) -> None:
        """Write it all; when the reader is gone, say so once and drop the rest."""
        view = memoryview(data)
        while view and not self._closed:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                _wait_writable(self._fd)
            except OSError:
                self._closed = True
                self._on_closed()


class Input:
    """Bytes from stdin to the console, no faster than the guest takes them.

    on_escape: called when the escape key is pressed; None passes every byte on.
    """

    def __init__(self, fd: int, console: Console, on_escape: Callable[[], None] | None) -> None:
        self._fd = fd
        self._console = console
        self._on_escape = on_escape

    async def forward(self) -> None:
        """Until stdin ends, the guest ends, or the escape key comes."""
        loop = asyncio.get_running_loop()
        while True:
            data = await _read(loop, self._fd)
            if not data:
                return
            if self._on_escape is not None and ESCAPE_KEY in data:
                self._console.write_nowait(data[: data.index(ESCAPE_KEY)])
                self._on_escape()
                return
            await self._console.write(data)


async def _read(loop: asyncio.AbstractEventLoop, fd: int) -> bytes:
    """One read; regular files, which no loop can watch, are read at once."""
    ready: asyncio.Future[None] = loop.create_future()
    try:
        loop.add_reader(fd, _set_once, ready)
    except OSError:
        return os.read(fd, _READ_BYTES)
    try:
        await ready
    finally:
        loop.remove_reader(fd)
    with contextlib.suppress(OSError):  # a terminal that was hung up reads as its end
        return os.read(fd, _READ_BYTES)
    return b""


def _wait_writable(fd: int) -> None:
    import select

    select.select([], [fd], [])


def is_terminal() -> bool:
    """Whether a user sits at both ends."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def _set_once(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
