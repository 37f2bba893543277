"""A console of the guest as an asyncio object, whatever device it is on."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass

from avmm.console.streams import LIMIT_BYTES, GuestReader, GuestTransport, GuestWriter, InputQueue
from avmm.errors import ConfigError, HostError
from avmm.units import GIB, KIB, parse_size

SCROLLBACK_BYTES = 256 * KIB
_TAIL_BYTES = 2000
_SIZE_MAX = 0xFFFF
_SCROLLBACK_MAX_BYTES = 1 * GIB


def check_scrollback(size: str | int, what: str) -> int:
    """A scrollback's size in bytes. Raises ConfigError("size") for one that cannot be."""
    size_bytes = parse_size(size, what)
    if not 0 < size_bytes <= _SCROLLBACK_MAX_BYTES:
        raise ConfigError("size", f"{what}: {size} is not in 1 byte to 1G")
    return size_bytes


@dataclass(frozen=True, slots=True)
class ConsoleStatistics:
    """written_bytes: by the guest. lost_bytes: that readers were too slow to see, of all of them.
    readers: pairs of streams that are open."""

    written_bytes: int
    lost_bytes: int
    readers: int


class Console:
    """What the guest writes and reads on one console. Loop thread.

    The guest never waits for those who read: the last `scrollback_bytes` are kept, and a reader
    that falls further behind loses the oldest bytes and is told (`GuestReader.lost_bytes`). So a
    reader that never reads holds a bounded amount of memory, and nobody back. Only a console on a
    serial port can make its guest wait instead, for readers opened with `hold`.
    """

    def __init__(
        self,
        name: str,
        put: Callable[[memoryview], int],
        *,
        scrollback_bytes: int = SCROLLBACK_BYTES,
        resize: Callable[[int, int], None] | None = None,
        release: Callable[[], None] | None = None,
    ) -> None:
        """For the device. put: see InputQueue. resize: tells the guest columns and rows. release:
        called when `held` turns false; None for a device that cannot make the guest wait."""
        self.name = name
        self.end_reason = ""
        self._limit = scrollback_bytes
        self._resize = resize
        self._release = release
        self._text = bytearray()
        self._start = 0  # position of _text[0]; every byte has one, counted from the guest's first
        self._expected = 0  # position behind the last match
        self._input = InputQueue(put)
        self._readers: set[_ConsoleTransport] = set()
        self._news: set[asyncio.Future[None]] = set()
        self._lost_bytes = 0
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether the guest has ended."""
        return self._closed

    @property
    def scrollback(self) -> bytes:
        """The last bytes the guest wrote, at most the scrollback's size."""
        return bytes(self._text)

    @property
    def end(self) -> int:
        """How many bytes the guest has written so far."""
        return self._start + len(self._text)

    @property
    def can_hold(self) -> bool:
        """Whether its device can make the guest wait for a reader."""
        return self._release is not None

    @property
    def held(self) -> bool:
        """Whether a reader makes the guest wait."""
        return any(reader.hold and reader.is_paused() for reader in self._readers)

    def open(
        self, *, scrollback: bool = True, hold: bool = False, limit: int = LIMIT_BYTES
    ) -> tuple[GuestReader, GuestWriter]:
        """A pair of streams; any number may be open, each with its own position.

        The reader begins with what is in the scrollback, or with `scrollback` off with what the
        guest writes from now on, and is at its end when the guest has ended. The writer's drain()
        waits for the guest; bytes of one write() stay together. Close the writer, or drop both, to
        give them back.
        limit: as of asyncio's streams; the reader holds up to twice as much, and what comes in one
        piece, at most 64 KiB.
        hold: the guest waits when this reader does not read, so it loses nothing.

        Raises ConfigError("hold") when the device cannot make its guest wait.
        """
        if hold and not self.can_hold:
            raise ConfigError("hold", f"{self.name}: its guest cannot wait for a reader")
        position = self._start if scrollback else self.end
        transport = _ConsoleTransport(self, self._input, position, limit=limit, hold=hold)
        reader, writer = transport.pair(limit)
        self._readers.add(transport)
        transport.advance()
        if self._closed:
            transport.catch_up()
            transport.end()
        return reader, writer

    async def write(self, data: bytes) -> None:
        """Send bytes to the guest, beside expect(); returns when its device has taken them all.

        Bytes of one write stay together, and are sent also when the caller is cancelled. A guest
        that reads nothing is waited for. Raises HostError("console-closed").
        """
        self._check_open(f"Writing to the {self.name}")
        if data:
            write = _Write(len(data))
            self._input.add(bytes(data), write)
            await asyncio.shield(write.done)
            self._check_open(f"Writing to the {self.name}", lost=write.lost)

    async def expect(
        self, pattern: bytes | re.Pattern[bytes], timeout: float | None = None
    ) -> re.Match[bytes]:
        """Wait until the guest has written `pattern`, a regular expression; the match.

        Looks at what came after the previous match, the scrollback included. timeout: seconds.
        Raises TimeoutError, and HostError("console-closed") when the guest ends first.
        """
        regex = re.compile(pattern)
        try:
            async with asyncio.timeout(timeout):
                while True:
                    match = regex.search(self._text, max(self._expected - self._start, 0))
                    if match is not None:
                        self._expected = self._start + match.end()
                        return _frozen(regex, match)
                    self._check_open(f"Waiting for {regex.pattern!r} on the {self.name}")
                    await self._more()
        except TimeoutError:
            raise TimeoutError(
                f"{regex.pattern!r} did not come in {timeout} s; the {self.name} ends with "
                f"{bytes(self._text[-_TAIL_BYTES:])!r}"
            ) from None

    def resize(self, columns: int, rows: int) -> None:
        """Tell the guest the size of the terminal; a serial port has no way to."""
        if not (0 <= columns <= _SIZE_MAX and 0 <= rows <= _SIZE_MAX):
            raise ConfigError("size", f"{self.name}: {columns} x {rows} is no terminal's size")
        if self._resize is not None and not self._closed:
            self._resize(columns, rows)

    def statistics(self) -> ConsoleStatistics:
        """Counters as of now."""
        return ConsoleStatistics(self.end, self._lost_bytes, len(self._readers))

    # What follows is for the device.

    def receive(self, chunk: bytes) -> None:
        """The guest wrote."""
        self._text += chunk
        for reader in tuple(self._readers):
            reader.advance(chunk)
        excess = len(self._text) - self._limit
        if excess > 0:
            del self._text[:excess]
            self._start += excess
        self._wake()

    def feed(self) -> None:
        """The guest takes input again."""
        self._input.feed()

    def close(self) -> None:
        """The guest has ended. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for reader in tuple(self._readers):
            reader.catch_up()
            reader.end()
        self._input.clear()
        self._wake()

    # And this for the streams.

    def slice(self, position: int, size_bytes: int) -> tuple[bytes, int]:
        """Up to `size_bytes` from `position` on, and how many before them are gone."""
        lost = max(self._start - position, 0)
        at = position + lost - self._start
        return bytes(self._text[at : at + size_bytes]), lost

    def count_lost(self, count_bytes: int) -> None:
        """A reader missed some."""
        self._lost_bytes += count_bytes

    def released(self) -> None:
        """A reader that the guest waited for reads again, or is gone."""
        if self._release is not None and not self.held and not self._closed:
            self._release()

    def forget(self, transport: _ConsoleTransport) -> None:
        """A pair of streams is closed."""
        self._readers.discard(transport)

    async def _more(self) -> None:
        news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._news.add(news)
        try:
            await news
        finally:
            self._news.discard(news)

    def _wake(self) -> None:
        for news in self._news:
            if not news.done():
                news.set_result(None)

    def _check_open(self, op: str, *, lost: bool | None = None) -> None:
        if self._closed if lost is None else lost:
            raise HostError(
                "console-closed",
                op=op,
                remedy=f"the guest has ended; its {self.name} ends with "
                f"{bytes(self._text[-_TAIL_BYTES:])!r}",
            )


class _ConsoleTransport(GuestTransport):
    """One pair of streams of a console.

    position: of the next byte that the reader is given.
    """

    def __init__(
        self, console: Console, input: InputQueue, position: int, *, limit: int, hold: bool
    ) -> None:
        super().__init__(console.name, input)
        self.hold = hold
        self._console = console
        self._position = position
        self._limit = limit

    def advance(self, chunk: bytes = b"") -> None:
        """Give the reader what it takes. chunk: what was written last."""
        if self.hold:  # it has room for this: the guest waits from now on if it has to
            self.catch_up()
        elif self.is_reading() and self._position == self._console.end - len(chunk):
            self._position += len(chunk)
            self.receive(chunk)
        else:
            while self.is_reading() and self._step():
                pass

    def catch_up(self) -> None:
        """Give the reader all that the scrollback has, whether or not it takes more."""
        while self._step():
            pass

    def on_read(self) -> None:
        """Go on where the reader stopped."""
        if self.hold:
            self._console.released()
        else:
            self.advance()

    def on_closed(self) -> None:
        """The pair is gone."""
        self._console.forget(self)

    def _step(self) -> bool:
        data, lost = self._console.slice(self._position, self._limit)
        if lost:
            self.count_lost(lost)
            self._console.count_lost(lost)
        self._position += lost + len(data)
        self.receive(data)
        return bool(data)


class _Write:
    """A call of Console.write()."""

    def __init__(self, size_bytes: int) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.lost = False
        self._left_bytes = size_bytes

    def on_taken(self, count_bytes: int) -> None:
        """The guest has more of it."""
        self._left_bytes -= count_bytes
        if not self._left_bytes and not self.done.done():
            self.done.set_result(None)

    def on_lost(self) -> None:
        """The guest will never take the rest."""
        self.lost = True
        if not self.done.done():
            self.done.set_result(None)


def _frozen(regex: re.Pattern[bytes], match: re.Match[bytes]) -> re.Match[bytes]:
    """The match over a copy: one over the scrollback itself would forbid to shorten it."""
    found = bytes(match.string)
    again = regex.search(found, match.start())
    assert again is not None
    return again
