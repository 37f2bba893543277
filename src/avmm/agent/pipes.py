"""The streams of a command: asyncio's own readers and writers over windows of bytes."""

from __future__ import annotations

import asyncio
from collections import deque

from avmm.agent import protocol
from avmm.agent.connection import Connection
from avmm.agent.protocol import FRAME_MAX_BYTES, OUTPUT_WINDOW_BYTES, STDIN_WINDOW_BYTES, Type
from avmm.errors import AvmmError

_HIGH_WATER_BYTES = 64 * 1024


class OutputTransport(asyncio.ReadTransport):
    """stdout or stderr. What the reader has not taken is bounded: by its limit and one window."""

    def __init__(self, connection: Connection, type: Type, limit: int) -> None:
        super().__init__()
        self.reader = asyncio.StreamReader(limit)
        self._connection = connection
        self._type = type
        self._owed = 0  # bytes taken that the agent may not yet send again
        self._paused = False
        self._ended = False
        self.reader.set_transport(self)

    def take(self, data: bytes) -> None:
        """What the command wrote; empty at its end. Raises GuestFault."""
        self._owed += len(data)
        if self._ended or self._owed > OUTPUT_WINDOW_BYTES:
            raise protocol.nonsense(f"more of {self._type.name} than was allowed")
        if not data:
            self._ended = True
            self.reader.feed_eof()
            return
        self.reader.feed_data(data)
        if self._owed >= OUTPUT_WINDOW_BYTES // 2:
            self._grant()

    def end(self, error: AvmmError | None) -> None:
        """No more will come; error: when that is not the command's doing."""
        if self._ended:
            return
        self._ended = True
        if error is None:
            self.reader.feed_eof()
        else:
            self.reader.set_exception(error)

    def pause_reading(self) -> None:
        """Called by the reader."""
        self._paused = True

    def resume_reading(self) -> None:
        """Called by the reader."""
        self._paused = False
        self._grant()

    def is_reading(self) -> bool:
        """Whether the agent may go on sending."""
        return not self._paused and not self._ended

    def is_closing(self) -> bool:
        """Whether the end was seen."""
        return self._ended

    def _grant(self) -> None:
        if self._owed and not self._paused and not self._ended:
            self._connection.send(Type.WINDOW, protocol.pack_window(self._type, self._owed))
            self._owed = 0


class InputTransport(asyncio.WriteTransport):
    """stdin. Sends as much as the command has room for, and lets drain() wait for the rest."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        loop = asyncio.get_running_loop()
        self._connection = connection
        self._credit = STDIN_WINDOW_BYTES
        self._waiting: deque[memoryview] = deque()
        self._size = 0
        self._high, self._low = _HIGH_WATER_BYTES, _HIGH_WATER_BYTES // 4
        self._paused = False
        self._closing = False
        self._closed = False
        self._loop = loop
        self._protocol = asyncio.StreamReaderProtocol(asyncio.StreamReader(loop=loop), loop=loop)
        self._protocol.connection_made(self)
        self.writer = asyncio.StreamWriter(self, self._protocol, None, loop)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Queue bytes; those for a command that takes no more are dropped, as drain() tells."""
        if not data or self._closing:
            return
        view = memoryview(bytes(data))
        self._waiting.append(view)
        self._size += len(view)
        self._flush()

    def write_eof(self) -> None:
        """The command's end of file, behind what is queued."""
        if not self._closing:
            self._closing = True
            self._flush()

    def can_write_eof(self) -> bool:
        """Always."""
        return True

    def close(self) -> None:
        """As write_eof(): a pipe has one direction."""
        self.write_eof()

    def abort(self) -> None:
        """End of file now, without what is queued."""
        self._waiting.clear()
        self._size = 0
        self.write_eof()

    def is_closing(self) -> bool:
        """Whether it was closed by either side."""
        return self._closing

    def get_write_buffer_size(self) -> int:
        """Bytes queued here."""
        return self._size

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """(low, high)."""
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """When drain() begins and stops to wait, in bytes."""
        self._high = high if high is not None else 4 * low if low else _HIGH_WATER_BYTES
        self._low = low if low is not None else self._high // 4
        self._balance()

    def allow(self, size_bytes: int) -> None:
        """The command has taken so much. Raises GuestFault."""
        self._credit += size_bytes
        if self._credit > STDIN_WINDOW_BYTES:
            raise protocol.nonsense("more room for stdin than there can be")
        if not self._closed:
            self._flush()

    def refuse(self) -> None:
        """The command takes no more."""
        self._waiting.clear()
        self._size = 0
        self._closing = True
        self._lose(BrokenPipeError("The command has closed its stdin"))

    def _flush(self) -> None:
        while self._waiting and self._credit:
            view = self._waiting[0]
            part = view[: min(self._credit, FRAME_MAX_BYTES)]
            self._connection.send(Type.STDIN, bytes(part))
            self._credit -= len(part)
            self._size -= len(part)
            if len(part) < len(view):
                self._waiting[0] = view[len(part) :]
            else:
                self._waiting.popleft()
        if self._closing and not self._waiting:
            if not self._closed:
                self._connection.send(Type.STDIN)
            self._lose(None)
        self._balance()

    def _lose(self, error: Exception | None) -> None:
        if not self._closed:
            self._closed = True
            self._loop.call_soon(self._protocol.connection_lost, error)

    def _balance(self) -> None:
        if not self._paused and self._size > self._high:
            self._paused = True
            self._protocol.pause_writing()
        elif self._paused and self._size <= self._low:
            self._paused = False
            self._protocol.resume_writing()
