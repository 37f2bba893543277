"""The host's end of a guest's vsock: asyncio streams to it and from it, in this process."""

from __future__ import annotations

import asyncio
import errno
import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol, Self

from avmm.errors import ConfigError
from avmm.log import GuestLog
from avmm.vsock.packet import PORT_MAX
from avmm.vsock.reasons import Reason
from avmm.vsock.table import Counters
from avmm.vsock.transport import Stream, StreamTransport

log = logging.getLogger(__name__)

LIMIT_BYTES: Final = 64 * 1024
"""Of a StreamReader, as in asyncio."""
CONNECT_LIMIT_S: Final = 10.0
_HANDLERS_LIMIT_S: Final = 1.0

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Callback = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None]
Factory = Callable[[], asyncio.BaseProtocol]


class Connections(Protocol):
    """What a host needs of a Table, here or in another process; see there."""

    cid: int
    counters: Counters

    def answer_by(self, on_request: Callable[[Stream], bool]) -> None:
        """Who decides about a guest that asks."""
        ...

    def check_open(self) -> None:
        """Raises ConnectionResetError after close()."""
        ...

    def ask(self, guest_port: int) -> Stream:
        """A new connection."""
        ...

    def close(self, reason: Reason) -> None:
        """End all."""
        ...


class VsockServer:
    """Takes the guest's connections to one port, until it is closed. Loop.

    `async with server:` closes it and waits.
    """

    def __init__(self, port: int, factory: Factory, on_close: Callable[[int], object]) -> None:
        self.port = port
        self._factory = factory
        self._on_close = on_close
        self._serving = True
        self._transports: set[StreamTransport] = set()
        self._idle = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.close()
        await self.wait_closed()

    def is_serving(self) -> bool:
        """Whether it takes connections."""
        return self._serving

    def close(self) -> None:
        """Take no more connections; those there are go on. Idempotent."""
        if self._serving:
            self._serving = False
            self._on_close(self.port)
            self._check_idle()

    async def wait_closed(self) -> None:
        """Wait until it is closed and the last of its connections has ended."""
        await self._idle.wait()

    # What follows is for the host.

    def protocol(self) -> asyncio.BaseProtocol:
        """For the next connection. Raises what the program's factory raises."""
        return self._factory()

    def take(self, host: VsockHost, connection: Stream, protocol: asyncio.BaseProtocol) -> None:
        """A connection of the guest's, accepted."""
        transport = host.transport(connection, protocol)
        self._transports.add(transport)
        transport.lost.add_done_callback(lambda _: self._forget(transport))
        connection.accept()
        transport.on_open()

    def _forget(self, transport: StreamTransport) -> None:
        self._transports.discard(transport)
        self._check_idle()

    def _check_idle(self) -> None:
        if not self._serving and not self._transports:
            self._idle.set()


class VsockHost:
    """`MicroVM.vsock`. All methods on the loop of the microVM.

    Many microVMs may have the same CID: it means something to the guest alone. Streams end with
    ConnectionResetError when the guest resets them, its driver, or with the microVM itself; it says
    why, the same with isolation and without.
    """

    def __init__(
        self,
        table: Connections,
        loop: asyncio.AbstractEventLoop,
        guest_log: GuestLog,
        on_serve: Callable[[int, bool], object] = lambda port, serving: None,
    ) -> None:
        self.guest_log = guest_log
        self.table = table
        table.answer_by(self._on_request)
        self._on_serve = on_serve
        self._loop = loop
        self._servers: dict[int, VsockServer] = {}
        self._handlers: set[asyncio.Task[None]] = set()

    @property
    def cid(self) -> int:
        """The guest's."""
        return self.table.cid

    async def connect(
        self, port: int, *, timeout_s: float | None = CONNECT_LIMIT_S, limit: int = LIMIT_BYTES
    ) -> Streams:
        """Connect to a port on which a program of the guest listens; as asyncio.open_connection().

        A guest that still boots is waited for. limit: bytes that the reader keeps for who does not
        read; the guest is stopped soon after. Raises ConnectionRefusedError when nobody listens,
        or too many are waiting there; TimeoutError when there is no answer in timeout_s (None:
        wait for ever); ConnectionResetError when the microVM ends; HostError("vsock") beyond 8192
        connections, 1024 with isolation.
        """
        reader = asyncio.StreamReader(limit=limit, loop=self._loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=self._loop)
        transport = await self.create_connection(lambda: protocol, port, timeout_s=timeout_s)
        return reader, asyncio.StreamWriter(transport, protocol, reader, self._loop)

    async def create_connection(
        self, factory: Factory, port: int, *, timeout_s: float | None = CONNECT_LIMIT_S
    ) -> asyncio.Transport:
        """The same for an asyncio.Protocol, which `factory` makes."""
        port, protocol = _checked(port), factory()
        connection = self.table.ask(port)
        transport = self.transport(connection, protocol)
        connection.ask()
        try:
            async with asyncio.timeout(timeout_s):
                await transport.opened
        except TimeoutError:
            transport.abort()
            raise TimeoutError(
                errno.ETIMEDOUT, f"The guest does not answer at vsock port {port}"
            ) from None
        except ConnectionRefusedError:
            self.table.counters.refused += 1
            raise
        except BaseException:
            transport.abort()
            raise
        self.table.counters.opened += 1
        return transport

    async def serve(
        self, port: int, callback: Callback, *, limit: int = LIMIT_BYTES
    ) -> VsockServer:
        """Take the guest's connections to `port` of CID 2; as asyncio.start_server().

        callback: called with (reader, writer) of each; a coroutine function runs as a task. What
        it raises is logged, and resets its connection. Tasks that still run when the microVM has
        ended are cancelled. Raises ConfigError("vsock-port") when the port is served already,
        ConnectionResetError when the microVM has ended.
        """

        def factory() -> asyncio.BaseProtocol:
            reader = asyncio.StreamReader(limit=limit, loop=self._loop)
            return asyncio.StreamReaderProtocol(reader, self._handler(callback), loop=self._loop)

        return self.create_server(factory, port)

    def create_server(self, factory: Factory, port: int) -> VsockServer:
        """The same for an asyncio.Protocol, which `factory` makes for each connection."""
        self.table.check_open()
        if _checked(port) in self._servers:
            raise ConfigError("vsock-port", f"vsock port {port} is served already")
        server = VsockServer(port, factory, self._forget)
        self._on_serve(port, True)
        self._servers[port] = server
        return server

    # What follows is for the device.

    def transport(self, connection: Stream, protocol: asyncio.BaseProtocol) -> StreamTransport:
        """For a connection of this guest's."""
        return StreamTransport(self._loop, connection, protocol, self._report)

    async def close(self) -> None:
        """End all: streams with ConnectionResetError, servers, their tasks. Idempotent."""
        self.table.close(Reason.MICROVM_ENDED)
        for server in tuple(self._servers.values()):
            server.close()
        for stop in (False, True):
            if stop:
                for task in self._handlers:
                    task.cancel()
            if self._handlers:
                await asyncio.wait(self._handlers, timeout=_HANDLERS_LIMIT_S)

    def _forget(self, port: int) -> None:
        del self._servers[port]
        self._on_serve(port, False)

    def _on_request(self, connection: Stream) -> bool:
        server = self._servers.get(connection.host_port)
        if server is None:
            return False
        try:
            protocol = server.protocol()
        except Exception as e:
            self._report({"message": "A factory of a VsockServer failed", "exception": e})
            return False
        self.table.counters.opened += 1
        server.take(self, connection, protocol)
        return True

    def _handler(
        self, callback: Callback
    ) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]:
        def start(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            result = callback(reader, writer)
            if inspect.isawaitable(result):
                task = self._loop.create_task(self._handle(result, writer))
                self._handlers.add(task)
                task.add_done_callback(self._handlers.discard)

        return start

    async def _handle(self, work: Awaitable[None], writer: asyncio.StreamWriter) -> None:
        try:
            await work
        except ConnectionError as e:
            name = writer.get_extra_info("sockname")
            self.guest_log.write(log, logging.DEBUG, "vsock port %s: %s", name, e)
            writer.transport.abort()
        except BaseException as e:
            writer.transport.abort()
            if isinstance(e, asyncio.CancelledError):
                raise
            self._report(
                {
                    "message": "A callback of VsockHost.serve() failed",
                    "exception": e,
                    "transport": writer.transport,
                }
            )

    def _report(self, context: dict[str, Any]) -> None:
        """To the loop, as asyncio's servers do; only so often, for a guest can connect for ever."""
        if self.guest_log.admits():
            self._loop.call_exception_handler(context)


def _checked(port: int) -> int:
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= PORT_MAX:
        raise ConfigError("vsock-port", f"vsock port {port!r} is not in 0 to {PORT_MAX}")
    return port
