"""The user's terminal, or whatever else stdin and stdout are, as the guest's console."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import stat
import sys
import termios
import tty
from collections.abc import Awaitable, Callable, Iterator
from types import TracebackType
from typing import Self

ESCAPE_KEY = b"\x1d"
ESCAPE_NAME = "Ctrl-]"

_IO_BYTES = 65536
_ESCAPE_S = 0.2
"""For the guest to take what was typed before the escape key."""


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
    """Bytes to stdout, no faster than it takes them, and without making the loop wait.

    on_closed: called once, when whoever reads stdout is gone; the rest goes nowhere.
    """

    def __init__(self, fd: int, on_closed: Callable[[], None]) -> None:
        self._fd = fd
        self._own_fd = -1
        self._on_closed = on_closed
        self._closed = False

    def __enter__(self) -> Self:
        self._own_fd = _unblocked(self._fd)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._own_fd >= 0:
            os.close(self._own_fd)

    async def show(self, reader: asyncio.StreamReader) -> None:
        """Until the guest's end."""
        while data := await reader.read(_IO_BYTES):
            await self.write(data)

    async def write(self, data: bytes) -> None:
        """Returns when all of it is written."""
        fd = self._own_fd if self._own_fd >= 0 else self._fd
        view = memoryview(data)
        while view and not self._closed:
            try:
                view = view[os.write(fd, view) :]
            except BlockingIOError:
                await _ready(asyncio.get_running_loop(), fd, writing=True)
            except OSError:
                self._closed = True
                self._on_closed()


class Input:
    """Bytes from stdin to the guest, no faster than it takes them.

    send: returns when they are taken. on_escape: called when the escape key is pressed; None
    passes every byte on.
    """

    def __init__(
        self,
        fd: int,
        send: Callable[[bytes], Awaitable[None]],
        on_escape: Callable[[], None] | None,
    ) -> None:
        self._fd = fd
        self._send = send
        self._on_escape = on_escape

    async def forward(self) -> None:
        """Until stdin ends, the guest ends, or the escape key comes."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ConnectionError):  # the guest's end
            while data := await _read(loop, self._fd):
                typed, escape, _ = data.partition(ESCAPE_KEY)
                if self._on_escape is None or not escape:
                    await self._send(data)
                    continue
                sending = asyncio.ensure_future(self._send(typed))
                await asyncio.wait([sending], timeout=_ESCAPE_S)
                sending.cancel()
                self._on_escape()
                return


@contextlib.contextmanager
def watched_size(on_size: Callable[[int, int], None]) -> Iterator[None]:
    """Calls `on_size` with the terminal's columns and rows, now and whenever they change."""
    loop = asyncio.get_running_loop()

    def tell() -> None:
        with contextlib.suppress(OSError):  # no terminal any more
            size = os.get_terminal_size(sys.stdout.fileno())
            on_size(size.columns, size.lines)

    loop.add_signal_handler(signal.SIGWINCH, tell)
    try:
        tell()
        yield
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)


def _unblocked(fd: int) -> int:
    """A descriptor of the same terminal or pipe whose writes do not block; -1 when there is none.

    The flag is shared by all who have inherited a descriptor, so it is set on one of our own.
    A file is written as it is, and so is what cannot be opened again.
    """
    mode = os.fstat(fd).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        with contextlib.suppress(OSError):
            return os.open(f"/proc/self/fd/{fd}", flags)
    return -1


async def _read(loop: asyncio.AbstractEventLoop, fd: int) -> bytes:
    """One read; regular files, which no loop can watch, are read at once."""
    await _ready(loop, fd)
    with contextlib.suppress(OSError):  # a terminal that was hung up reads as its end
        return os.read(fd, _IO_BYTES)
    return b""


async def _ready(loop: asyncio.AbstractEventLoop, fd: int, *, writing: bool = False) -> None:
    """Wait for a descriptor; at once when the loop cannot watch it."""
    ready: asyncio.Future[None] = loop.create_future()
    add, remove = (
        (loop.add_writer, loop.remove_writer) if writing else (loop.add_reader, loop.remove_reader)
    )
    try:
        add(fd, _set_once, ready)
    except OSError:
        return
    try:
        await ready
    finally:
        remove(fd)


def is_terminal() -> bool:
    """Whether a user sits at both ends."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def _set_once(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
