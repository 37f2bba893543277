"""The two ends of a byte stream to a guest, as asyncio's own stream objects.

A console and a port hand out pairs of a reader and a writer. What is between them and the guest is
a transport in plain Python, so they work on every event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from avmm.units import KIB

LIMIT_BYTES = 64 * KIB
"""What a reader's line may be long, and half of what it holds before it takes no more."""


class Sender(Protocol):
    """Whoever queued bytes for the guest."""

    def on_taken(self, count_bytes: int) -> None:
        """The guest has so many more of them."""

    def on_lost(self) -> None:
        """It will never have the others."""


class InputQueue:
    """Bytes on their way to the guest, in the order of the writes; each write stays together.

    put: offers bytes to the guest; how many it took. When it took fewer, feed() has to be called
    when it takes more.
    """

    def __init__(self, put: Callable[[memoryview], int]) -> None:
        self._put = put
        self._queue: deque[tuple[memoryview, Sender]] = deque()
        self._feeding = False

    def __bool__(self) -> bool:
        return bool(self._queue)

    def add(self, data: bytes, sender: Sender) -> None:
        """Queue bytes, and give the guest what it takes now."""
        self._queue.append((memoryview(data), sender))
        self.feed()

    def feed(self) -> None:
        """Give the guest what it takes."""
        if self._feeding:  # a sender wrote more while it was told
            return
        self._feeding = True
        try:
            while self._queue:
                data, sender = self._queue[0]
                taken = self._put(data)
                if taken == len(data):
                    self._queue.popleft()
                elif taken:
                    self._queue[0] = data[taken:], sender
                if taken:
                    sender.on_taken(taken)
                if taken < len(data):
                    return
        finally:
            self._feeding = False

    def remove(self, sender: Sender) -> None:
        """Forget what is left of one sender's."""
        self._queue = deque(entry for entry in self._queue if entry[1] is not sender)

    def clear(self) -> None:
        """No more is taken: tell all senders."""
        queue, self._queue = self._queue, deque()
        for sender in {id(sender): sender for _, sender in queue}.values():
            sender.on_lost()


class GuestReader(asyncio.StreamReader):
    """An asyncio.StreamReader of what the guest writes.

    lost_bytes: how many this reader was too slow to see, of a console whose guest does not wait.
    What it reads next comes after them.
    """

    def __init__(self, limit: int, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(limit=limit, loop=loop)
        self.lost_bytes = 0


class GuestWriter(asyncio.StreamWriter):
    """An asyncio.StreamWriter of what the guest reads.

    drain() returns when the guest's device has taken all that was written, unless
    `transport.set_write_buffer_limits()` allows more; it raises ConnectionResetError when the
    guest ends, or closes its side, before that. wait_closed() waits for the same after close().
    """

    _end: GuestTransport

    async def drain(self) -> None:
        """Wait until the guest has taken what was written."""
        await super().drain()
        self._end.check_sent()


class GuestTransport(asyncio.Transport):
    """Between one pair of streams and the guest; what a console and a port have in common. Loop.

    input: where the pair's bytes wait for the guest. on_closed: called once, when the program has
    closed its side and the rest of its bytes are taken, or given up.
    """

    def __init__(self, name: str, input: InputQueue) -> None:
        super().__init__({"name": name})
        self._name = name
        self._input = input
        self._loop = asyncio.get_running_loop()
        self._reader: weakref.ref[GuestReader] | None = None
        self._protocol: asyncio.StreamReaderProtocol | None = None
        self._reading = True
        self._waiting_bytes = 0
        self._low, self._high = 0, 0
        self._writing_paused = False
        self._closing = False
        self._ended = False
        self._lost = False

    def pair(self, limit: int) -> tuple[GuestReader, GuestWriter]:
        """Make the streams, once."""
        reader = GuestReader(limit, self._loop)
        # A pair that nobody has any more would hold the guest, or the port, for ever.
        self._reader = weakref.ref(reader, lambda _: self._on_dropped())
        self._protocol = asyncio.StreamReaderProtocol(reader, loop=self._loop)
        self._protocol.connection_made(self)
        writer = GuestWriter(self, self._protocol, reader, self._loop)
        writer._end = self
        return reader, writer

    def on_read(self) -> None:
        """The reader takes bytes again, or is gone and nobody has to wait for it."""

    def on_closed(self) -> None:
        """The pair is gone."""

    def receive(self, data: bytes) -> None:
        """Bytes for the reader, whether or not it takes any."""
        if data and self._protocol is not None and not self._closing:
            self._protocol.data_received(data)

    def end(self) -> None:
        """The guest has ended, or has closed its side: the reader has had all there is."""
        if self._waiting_bytes:
            self._lost = True
            self._input.remove(self)
        self._closing = True
        self._finish()

    def is_paused(self) -> bool:
        """Whether the reader holds enough, and will take more when that is read."""
        return not self._reading and not self._closing

    def count_lost(self, count_bytes: int) -> None:
        """Tell the reader that it missed some."""
        reader = self._reader() if self._reader is not None else None
        if reader is not None:
            reader.lost_bytes += count_bytes

    def check_sent(self) -> None:
        """Raises ConnectionResetError when bytes were written that the guest never took."""
        if self._lost:
            raise ConnectionResetError(f"{self._name}: the guest ended before it took all bytes")

    # What follows is asyncio's.

    def is_reading(self) -> bool:
        """Whether the reader takes more."""
        return self._reading and not self._closing

    def pause_reading(self) -> None:
        """Called by a reader that holds enough."""
        self._reading = False

    def resume_reading(self) -> None:
        """Called by a reader that has room again."""
        if not self._reading:
            self._reading = True
            # The reader begins to wait after this call: what comes within it would not wake it.
            self._loop.call_soon(self._go_on)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Queue bytes for the guest; once either side has closed they go nowhere."""
        if data and not self._closing:
            copy = bytes(data)
            self._waiting_bytes += len(copy)
            self._input.add(copy, self)
            self._pace()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """How many bytes may wait for the guest before drain() waits; none, by default."""
        self._high = high if high is not None else 4 * low if low is not None else 0
        self._low = low if low is not None else self._high // 4
        if not self._high >= self._low >= 0:
            raise ValueError(f"high ({self._high}) must be >= low ({self._low}) must be >= 0")
        self._pace()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """(low, high)."""
        return self._low, self._high

    def get_write_buffer_size(self) -> int:
        """Bytes that the guest has not taken yet."""
        return self._waiting_bytes

    def can_write_eof(self) -> bool:
        """A guest's device knows no half-close."""
        return False

    def is_closing(self) -> bool:
        """Whether either side has closed."""
        return self._closing

    def close(self) -> None:
        """Read no more; what was written is still given to the guest."""
        if not self._closing:
            self._closing = True
            self.on_read()
            if not self._waiting_bytes:
                self._loop.call_soon(self._finish)

    def abort(self) -> None:
        """Close, and forget what the guest has not taken."""
        self._input.remove(self)
        self._lost |= self._waiting_bytes > 0
        self._waiting_bytes = 0
        if not self._closing:
            self._closing = True
            self.on_read()
        self._loop.call_soon(self._finish)

    def set_protocol(self, protocol: Any) -> None:
        """The streams keep their protocol."""
        raise NotImplementedError

    def get_protocol(self) -> asyncio.BaseProtocol:
        """The streams' protocol."""
        assert self._protocol is not None
        return self._protocol

    # And this the input queue's.

    def on_taken(self, count_bytes: int) -> None:
        """The guest has more of the bytes."""
        self._waiting_bytes -= count_bytes
        self._pace()
        if self._closing and not self._waiting_bytes:
            self._loop.call_soon(self._finish)

    def on_lost(self) -> None:
        """The guest will never take them."""
        self._lost = True

    def _on_dropped(self) -> None:
        """Of any thread, and of a loop that may be gone."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.close)

    def _go_on(self) -> None:
        if self.is_reading():
            self.on_read()

    def _pace(self) -> None:
        if self._protocol is None:
            return
        if not self._writing_paused and self._waiting_bytes > self._high:
            self._writing_paused = True
            self._protocol.pause_writing()
        elif self._writing_paused and self._waiting_bytes <= self._low:
            self._writing_paused = False
            self._protocol.resume_writing()

    def _finish(self) -> None:
        if self._ended:
            return
        self._ended = True
        self.on_closed()
        if self._protocol is not None:
            self._protocol.connection_lost(None)
