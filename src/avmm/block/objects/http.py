"""A disk read over HTTP: ranges of one file on a server, and a cache before it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import re
import ssl
from collections import OrderedDict
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from avmm.errors import ConfigError, HostError
from avmm.units import KIB, MIB, SECTOR_BYTES

BLOCK_BYTES = 256 * KIB
"""What is asked for at a time, and kept."""

_CONNECTIONS_MAX = 8
_HEAD_MAX_BYTES = 64 * KIB
_NUMBER = re.compile("[0-9]{1,18}")
"""Of bytes, in a header: a disk's offsets have 63 bits. str.isdigit() takes digits of other kinds,
and int() refuses thousands of them."""


@dataclass(frozen=True, slots=True)
class HttpStatistics:
    """requests: that the server has answered. hits, misses: blocks that reads found in the cache,
    or had to ask for. bytes: of disk that came over the network."""

    requests: int
    hits: int
    misses: int
    bytes: int


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    headers: dict[str, str]
    body: bytes


class HttpDisk:
    """A disk that is a file on a web server which knows ranges (RFC 9110, section 14); attach it
    with read_only=True, or below an object that keeps the writes.

        async with HttpDisk("http://images.example/root.img") as disk:
            config = Config(disks=[AsyncDisk(disk, read_only=True)], ...)

    An https server is checked by the certificates of the system, or of $SSL_CERT_FILE.

    The file must not change: when its ETag or date does, reads fail. Blocks of 256 KiB are kept,
    the last ones used, up to cache_bytes; of several reads that miss the same block one asks.
    timeout_s: for one answer. At most eight connections are open; they are used again, and one
    that the server has closed meanwhile is replaced.

    Entering raises ConfigError for a URL or a server that cannot be used, HostError when it cannot
    be reached. A read that fails raises OSError.
    """

    def __init__(self, url: str, *, cache_bytes: int = 64 * MIB, timeout_s: float = 30.0) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as e:
            raise ConfigError("http", f"HttpDisk {url}: {e}") from e
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError("http", f"HttpDisk {url}: not an http or https URL")
        if cache_bytes < BLOCK_BYTES:
            raise ConfigError("http", f"HttpDisk: cache_bytes={cache_bytes} is below {BLOCK_BYTES}")
        self.url = url
        self.size = 0
        if not url.isascii():
            raise ConfigError("http", f"HttpDisk {url}: not in ASCII; quote it as RFC 3986 has it")
        self._host, self._tls = parts.hostname, parts.scheme == "https"
        self._port = port or (443 if self._tls else 80)
        self._authority = parts.netloc.rpartition("@")[2]
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._blocks_max = cache_bytes // BLOCK_BYTES
        self._timeout_s = timeout_s
        self._validator = ("", "")
        self._cache: OrderedDict[int, bytes] = OrderedDict()
        self._coming: dict[int, asyncio.Task[bytes]] = {}
        self._free: list[_Connection] = []
        self._places = asyncio.Semaphore(_CONNECTIONS_MAX)
        self._requests = self._hits = self._misses = self._bytes = 0

    async def __aenter__(self) -> Self:
        try:
            await self._open()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def statistics(self) -> HttpStatistics:
        """Counters as of now."""
        return HttpStatistics(self._requests, self._hits, self._misses, self._bytes)

    async def read(self, offset: int, size: int) -> bytes:
        """From the cache, or from the server: blocks that are missing are asked for at once."""
        first, last = offset // BLOCK_BYTES, (offset + size - 1) // BLOCK_BYTES
        if first == last:
            data = await self._block(first)
        else:
            indices = range(first, last + 1)
            data = b"".join(await asyncio.gather(*map(self._block, indices)))
        begin = offset - first * BLOCK_BYTES
        return data[begin : begin + size]

    async def close(self) -> None:
        """Close the connections; reads under way fail. Idempotent."""
        tasks = list(self._coming.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while self._free:
            await self._free.pop().close()

    async def _open(self) -> None:
        try:
            answer = await self._ask(0, SECTOR_BYTES)
        except OSError as e:
            raise HostError("http", op=f"HttpDisk {self.url}", remedy=str(e)) from e
        size = answer.headers.get("content-range", "").rpartition("/")[2]
        if answer.status != 206 or not _NUMBER.fullmatch(size):
            raise ConfigError(
                "http",
                f"HttpDisk {self.url}: status {answer.status}; the server has to know ranges",
            )
        self.size = int(size)
        if not self.size or self.size % SECTOR_BYTES:
            raise ConfigError(
                "http", f"HttpDisk {self.url}: {self.size} bytes is not a positive multiple of 512"
            )
        self._validator = _validator(answer)

    async def _block(self, index: int) -> bytes:
        if (block := self._cache.get(index)) is not None:
            self._cache.move_to_end(index)
            self._hits += 1
            return block
        self._misses += 1
        task = self._coming.get(index)
        if task is None:
            task = asyncio.create_task(self._fetch(index))
            self._coming[index] = task
            task.add_done_callback(lambda task: self._came(index, task))
        # One reader that is cancelled must not take the block from the others.
        return await asyncio.shield(task)

    def _came(self, index: int, task: asyncio.Task[bytes]) -> None:
        del self._coming[index]
        if task.cancelled() or task.exception() is not None:
            return
        self._cache[index] = task.result()
        while len(self._cache) > self._blocks_max:
            self._cache.popitem(last=False)

    async def _fetch(self, index: int) -> bytes:
        begin = index * BLOCK_BYTES
        size = min(BLOCK_BYTES, self.size - begin)
        answer = await self._ask(begin, size)
        if answer.status != 206 or len(answer.body) != size:
            raise OSError(
                errno.EIO, f"{self.url}: status {answer.status} and {len(answer.body)} bytes"
            )
        if _validator(answer) != self._validator:
            raise OSError(errno.EIO, f"{self.url}: the file on the server has changed")
        self._bytes += size
        return answer.body

    async def _ask(self, begin: int, size: int) -> _Answer:
        """One request. A connection that was used before may be closed by now: then once more."""
        request = (
            f"GET {self._target} HTTP/1.1\r\nHost: {self._authority}\r\n"
            f"Range: bytes={begin}-{begin + size - 1}\r\nAccept-Encoding: identity\r\n\r\n"
        ).encode("ascii")
        async with self._places, asyncio.timeout(self._timeout_s):
            while True:
                connection = self._free.pop() if self._free else None
                used = connection is not None
                if connection is None:
                    connection = await _Connection.open(self._host, self._port, self._tls)
                try:
                    answer = await connection.ask(request, size)
                except (ConnectionError, asyncio.IncompleteReadError) as e:
                    await connection.close()
                    if used:
                        continue
                    raise OSError(errno.EIO, f"{self.url}: the server closed: {e}") from e
                except BaseException:
                    await connection.close()
                    raise
                break
        self._requests += 1
        if answer.headers.get("connection", "").lower() == "close":
            await connection.close()
        else:
            self._free.append(connection)
        return answer


class _Connection:
    """One connection, for one request after the other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, host: str, port: int, tls: bool) -> Self:
        context = ssl.create_default_context() if tls else None
        return cls(*await asyncio.open_connection(host, port, ssl=context, limit=_HEAD_MAX_BYTES))

    async def ask(self, request: bytes, body_max_bytes: int) -> _Answer:
        """Raises OSError for what is no answer, or too long a one."""
        self._writer.write(request)
        await self._writer.drain()
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError as e:
            raise OSError(errno.EIO, "the server's header is too long") from e
        line, *lines = head.decode("latin-1").split("\r\n")
        version, _, rest = line.partition(" ")
        status = rest.partition(" ")[0]
        if not version.startswith("HTTP/1.") or not re.fullmatch("[0-9]{3}", status):
            raise OSError(errno.EIO, f"not an answer of HTTP/1: {line[:80]!r}")
        headers = {
            name.strip().lower(): value.strip()
            for name, separator, value in (line.partition(":") for line in lines)
            if separator
        }
        length = headers.get("content-length", "")
        if status != "206" or not _NUMBER.fullmatch(length) or int(length) > body_max_bytes:
            # Whatever it sends besides is not worth reading.
            headers["connection"] = "close"
            return _Answer(int(status), headers, b"")
        return _Answer(206, headers, await self._reader.readexactly(int(length)))

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


def _validator(answer: _Answer) -> tuple[str, str]:
    """What changes when the file does."""
    return answer.headers.get("etag", ""), answer.headers.get("last-modified", "")
