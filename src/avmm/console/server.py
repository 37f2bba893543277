"""A console for other terminals: what `avmm attach` connects to."""

from __future__ import annotations

import asyncio
import logging
import os
from types import TracebackType
from typing import Self

from avmm.console.console import Console
from avmm.console.streams import GuestReader, GuestWriter
from avmm.console.wire import LOST, PAYLOAD_MAX_BYTES, SIZE, VERSION, Kind, frame, read_frame
from avmm.errors import HostError
from avmm.unixsocket import Listener

log = logging.getLogger(__name__)

CLIENTS_MAX = 32
_GRACE_S = 1.0
"""For a client to take its last bytes, and for the guest to take a client's."""


class ConsoleServer:
    """Serves one console on a unix socket, to any number of clients up to CLIENTS_MAX.

    `async with ConsoleServer(vm.console, path):` listens, and on the way out every client and the
    socket are gone. Each client gets the scrollback and then what the guest writes; one that is
    slow loses bytes and is told, and holds back neither the guest nor others. Loop.
    """

    def __init__(self, console: Console, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._console = console
        self._listener: Listener | None = None
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        """Raises ConfigError("socket") or HostError("socket")."""
        listener = Listener(self.path)
        try:
            os.chmod(self.path, 0o600)
            self._server = await asyncio.start_unix_server(self._accept, sock=listener.socket)
        except BaseException:
            listener.close()
            raise
        self._listener = listener
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._server is not None and self._listener is not None:
            self._server.close()
            self._listener.close()
        if self._clients and self._console.closed:
            await asyncio.wait(self._clients, timeout=_GRACE_S)  # they are being told
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            if len(self._clients) > CLIENTS_MAX:
                await _send_last(writer, b"too many are attached")
            else:
                await self._serve(reader, writer)
        except (ConnectionError, TimeoutError, HostError) as e:
            log.debug("console %s: a client: %s", self.path, e)
        except asyncio.CancelledError:
            log.debug("console %s: a client at the end of the server", self.path)
        finally:
            self._clients.discard(task)
            writer.transport.abort()  # what it was to get is sent, or it does not take it

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        output, input = self._console.open()
        # While drain() waits nobody sees that the client has gone: it should not, for a few keys.
        input.transport.set_write_buffer_limits(high=PAYLOAD_MAX_BYTES)
        showing = asyncio.create_task(self._show(output, writer))
        hearing = asyncio.create_task(self._hear(reader, input))
        try:
            await asyncio.wait((showing, hearing), return_when=asyncio.FIRST_COMPLETED)
            if self._console.closed:
                await asyncio.wait((showing,), timeout=_GRACE_S)
        finally:
            showing.cancel()
            hearing.cancel()
            results = await asyncio.gather(showing, hearing, return_exceptions=True)
            await _let_go(input)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _show(self, output: GuestReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frame(Kind.HELLO, VERSION))
        lost = 0
        while data := await output.read(PAYLOAD_MAX_BYTES):
            if output.lost_bytes > lost:
                writer.write(frame(Kind.LOST, LOST.pack(output.lost_bytes - lost)))
                lost = output.lost_bytes
            writer.write(frame(Kind.DATA, data))
            await writer.drain()
        await _send_last(writer, self._console.end_reason.encode()[:PAYLOAD_MAX_BYTES])

    async def _hear(self, reader: asyncio.StreamReader, input: GuestWriter) -> None:
        while (found := await read_frame(reader)) is not None:
            kind, payload = found
            if kind == Kind.DATA:
                input.write(payload)
                await input.drain()
            elif kind == Kind.SIZE and len(payload) == SIZE.size:
                self._console.resize(*SIZE.unpack(payload))
            else:
                raise HostError(
                    "console-protocol",
                    op="Console socket",
                    remedy=f"a client sent a frame of kind {kind} and {len(payload)} bytes",
                )


async def _send_last(writer: asyncio.StreamWriter, reason: bytes) -> None:
    """Returns when all is sent, or it takes too long."""
    writer.transport.set_write_buffer_limits(high=0)
    writer.write(frame(Kind.END, reason))
    async with asyncio.timeout(_GRACE_S):
        await writer.drain()


async def _let_go(input: GuestWriter) -> None:
    """What a client typed last is for the guest, if it takes it soon."""
    input.close()
    try:
        async with asyncio.timeout(_GRACE_S):
            await input.wait_closed()
    except TimeoutError:
        input.transport.abort()
