"""A web server with one file, for disks that are read over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class WebServer:
    """A web server of one file, that knows ranges; asked: the ranges it was asked for."""

    def __init__(self, data: bytes, tls: ssl.SSLContext | None = None) -> None:
        self.data = data
        self.tls = tls
        self.etag = '"1"'
        self.ranges = True
        self.close_after = False
        self.cut = False
        self.gate: asyncio.Event | None = None
        self.asked: list[tuple[int, int]] = []
        self.connections = 0
        self._writers: set[asyncio.StreamWriter] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls)
        try:
            port = server.sockets[0].getsockname()[1]
            yield f"http{'s' if self.tls else ''}://127.0.0.1:{port}/disk.img"
        finally:
            server.close()
            self.hang_up()
            await server.wait_closed()

    def hang_up(self) -> None:
        for writer in self._writers:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if self.gate is not None:
                    await self.gate.wait()
                writer.write(self._answer(head.decode()))
                await writer.drain()
                if self.close_after:
                    break
        self._writers.discard(writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    def _answer(self, head: str) -> bytes:
        found = re.search(r"^Range: bytes=(\d+)-(\d+)\r$", head, re.MULTILINE)
        assert found
        begin, end = int(found[1]), int(found[2]) + 1
        self.asked.append((begin, end - begin))
        if not self.ranges:
            return f"HTTP/1.1 200 OK\r\nContent-Length: {len(self.data)}\r\n\r\n".encode()
        body = self.data[begin:end]
        lines = [
            "HTTP/1.1 206 Partial Content",
            f"Content-Length: {len(body)}",
            f"Content-Range: bytes {begin}-{end - 1}/{len(self.data)}",
            f"ETag: {self.etag}",
            "",
            "",
        ]
        return "\r\n".join(lines).encode() + (body[:-1] if self.cut else body)
