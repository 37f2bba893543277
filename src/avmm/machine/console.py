"""The serial console as an asyncio object."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable

from avmm.errors import HostError
from avmm.legacy.serial16550 import Serial16550
from avmm.units import KIB

SCROLLBACK_BYTES = 256 * KIB
_TAIL_BYTES = 2000


class Console:
    """What the guest writes and reads on its serial port. Loop thread.

    The last `scrollback_bytes` are kept; every byte has a position, counted from the guest's
    first, so readers that lag behind know what they missed.
    """

    def __init__(self, serial: Serial16550, scrollback_bytes: int = SCROLLBACK_BYTES) -> None:
        self._serial = serial
        self._limit = scrollback_bytes
        self._text = bytearray()
        self._start = 0  # position of _text[0]
        self._expected = 0  # position behind the last match
        self._input: deque[memoryview] = deque()
        self._input_taken = asyncio.Event()
        self._news: set[asyncio.Future[None]] = set()
        self._sinks: list[Callable[[bytes], None]] = []
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin to listen; needs a running loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._serial.event_fd, self.drain)

    def close(self) -> None:
        """Take what is left and tell all readers that no more will come. Idempotent."""
        if self._loop is None or self._closed:
            return
        self._loop.remove_reader(self._serial.event_fd)
        self.drain()
        self._closed = True
        self._input.clear()
        self._input_taken.set()
        self._wake()

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

    def add_sink(self, sink: Callable[[bytes], None]) -> None:
        """Give every further chunk of output to `sink`, on the loop; it must not block."""
        self._sinks.append(sink)

    def remove_sink(self, sink: Callable[[bytes], None]) -> None:
        """Undo add_sink()."""
        self._sinks.remove(sink)

    async def write(self, data: bytes) -> None:
        """Send bytes to the guest; returns when its serial port has taken the last of them.

        Bytes of one write stay together. Raises HostError("console-closed").
        """
        self.write_nowait(data)
        while self._input:
            self._input_taken.clear()
            await self._input_taken.wait()
        self._check_open("Writing to the console")

    def write_nowait(self, data: bytes) -> None:
        """Queue bytes for the guest. Raises HostError("console-closed")."""
        self._check_open("Writing to the console")
        if data:
            self._input.append(memoryview(data))
            self._feed()

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
                    self._check_open(f"Waiting for {regex.pattern!r} on the console")
                    await self._more()
        except TimeoutError:
            raise TimeoutError(
                f"{regex.pattern!r} did not come in {timeout} s; the console ends with "
                f"{bytes(self._text[-_TAIL_BYTES:])!r}"
            ) from None

    async def read(self, position: int) -> tuple[bytes, int]:
        """What the guest has written from `position` on, at least one byte, and the position
        behind it; b"" at the guest's end. Any number of readers, each with its own position.

        Bytes that have left the scrollback are skipped: the returned position tells.
        """
        while position >= self.end and not self._closed:
            await self._more()
        chunk = bytes(self._text[max(position - self._start, 0) :])
        return chunk, self.end

    def drain(self) -> None:
        """Take what the guest wrote and give it what it may read next. Loop thread."""
        while chunk := self._serial.take():
            self._text += chunk
            for sink in tuple(self._sinks):
                sink(chunk)
        excess = len(self._text) - self._limit
        if excess > 0:
            del self._text[:excess]
            self._start += excess
        self._feed()
        self._wake()

    def _feed(self) -> None:
        while self._input:
            taken = self._serial.put(self._input[0])
            if taken < len(self._input[0]):
                self._input[0] = self._input[0][taken:]
                return
            self._input.popleft()
        self._serial.put(b"")
        self._input_taken.set()

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

    def _check_open(self, op: str) -> None:
        if self._closed:
            raise HostError(
                "console-closed",
                op=op,
                remedy=f"the guest has ended; its console ends with "
                f"{bytes(self._text[-_TAIL_BYTES:])!r}",
            )


def _frozen(regex: re.Pattern[bytes], match: re.Match[bytes]) -> re.Match[bytes]:
    """The match over a copy: one over the scrollback itself would forbid to shorten it."""
    found = bytes(match.string)
    again = regex.search(found, match.start())
    assert again is not None
    return again
