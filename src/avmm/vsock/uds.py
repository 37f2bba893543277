"""vsock ports as unix sockets, by Firecracker's convention, for programs that know no vsock.

A program of the host connects to PATH, writes "CONNECT port\\n", reads "OK hostport\\n", and then
talks to the guest's program at that port. What a program of the guest connects to, at port P of
CID 2, is the unix socket PATH_P, where no Python code serves that port.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
from collections.abc import Coroutine
from typing import Any, Final, cast

from avmm.errors import AvmmError, HostError
from avmm.loop import add_reader
from avmm.unixsocket import Listener
from avmm.vsock.connection import Connection
from avmm.vsock.host import VsockHost
from avmm.vsock.packet import PORT_MAX

log = logging.getLogger(__name__)

_COMMAND: Final = re.compile(rb"CONNECT ([0-9]{1,10})\r?")
_COMMAND_MAX_BYTES: Final = 32
_COMMAND_LIMIT_S: Final = 60.0
_ASKING_MAX: Final = 1024
"""Programs that have connected and are not connected to the guest yet."""

_REST_S = 1.0
"""Between attempts to take a connection for which the host has no descriptor."""


class Relay(asyncio.Protocol):
    """One end of two that are joined: what comes here is written to `other`, and the other way.

    The guest's end is made first, and waits for the other.
    """

    def __init__(self, other: Relay | None = None) -> None:
        self.transport: asyncio.Transport | None = None
        self.other = other
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._has_eof = False
        self._error: Exception | None = None
        if other is not None:
            other.other = self

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, or wait for the other end."""
        self.transport = cast(asyncio.Transport, transport)
        if self.other is None:
            self.transport.pause_reading()
            return
        self.other._go_on()

    def data_received(self, data: bytes) -> None:
        """Pass it on."""
        if (to := self._open_other()) is not None:
            to.write(data)

    def eof_received(self) -> bool:
        """Pass it on, and stay for the other direction."""
        self._has_eof = True
        if (to := self._open_other()) is not None:
            # A socket whose other end has gone refuses; connection_lost() follows.
            with contextlib.suppress(OSError):
                to.write_eof()
        return True

    def pause_writing(self) -> None:
        """It takes no more for now, so nothing more is read at the other end."""
        if (source := self._open_other()) is not None:
            source.pause_reading()

    def resume_writing(self) -> None:
        """Undo pause_writing()."""
        if (source := self._open_other()) is not None:
            source.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        """The other end goes in the same way."""
        self._error = error
        if not self.lost.done():
            self.lost.set_result(None)
        if (to := self._open_other()) is None:
            return
        if error is None:
            to.close()
        else:
            to.abort()

    def _go_on(self) -> None:
        """The other end is there, and hears what happened meanwhile."""
        assert self.transport is not None
        if self._has_eof:
            self.eof_received()
        if self.lost.done():
            self.connection_lost(self._error)
        else:
            self.transport.resume_reading()

    def _open_other(self) -> asyncio.Transport | None:
        transport = self.other.transport if self.other is not None else None
        return None if transport is None or transport.is_closing() else transport


class UnixSockets:
    """The sockets of one guest. Loop. Owns PATH, and all connections until they end.

    Raises ConfigError("socket") or HostError when PATH cannot be had.
    """

    def __init__(self, path: str, host: VsockHost, loop: asyncio.AbstractEventLoop) -> None:
        self._path = path
        self._host = host
        self._loop = loop
        self._listener = Listener(path)
        self._tasks: set[asyncio.Task[None]] = set()
        self._programs: set[Relay] = set()
        self._resting: asyncio.TimerHandle | None = None
        try:
            self._listen()
        except BaseException:
            self._listener.close()
            raise
        host.fallback = self._on_request

    async def close(self) -> None:
        """End all and remove PATH."""
        self._host.fallback = None
        if self._resting is not None:
            self._resting.cancel()
        self._loop.remove_reader(self._listener.socket.fileno())
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for program in tuple(self._programs):
            if program.transport is not None:
                program.transport.abort()
                await program.lost

    # --- from the host to the guest

    def _listen(self) -> None:
        add_reader(self._loop, self._listener.socket.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            program = self._listener.accept()
        except HostError as e:
            # The connection stays where it is, so without a rest the loop would do nothing else.
            self._host.guest_log.write(log, logging.WARNING, "vsock: %s", e)
            self._loop.remove_reader(self._listener.socket.fileno())
            self._resting = self._loop.call_later(_REST_S, self._listen)
            return
        if program is None:
            return
        if len(self._tasks) >= _ASKING_MAX:
            program.close()
            return
        self._start(self._ask(program))

    async def _ask(self, program: socket.socket) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(program.close)
            async with asyncio.timeout(_COMMAND_LIMIT_S):
                port, rest = await self._read_command(program)
            guest = Relay()
            transport = await self._host.create_connection(lambda: guest, port)
            stack.callback(transport.abort)
            _, host_port = transport.get_extra_info("sockname")
            await self._loop.sock_sendall(program, b"OK %d\n" % host_port)
            transport.write(rest)
            stack.pop_all()
            await self._join(guest, program)

    async def _read_command(self, program: socket.socket) -> tuple[int, bytes]:
        """The port of a CONNECT, and what came after it."""
        line = b""
        while b"\n" not in line:
            if len(line) >= _COMMAND_MAX_BYTES:
                raise ConnectionAbortedError(f"{line!r}... is no command")
            data = await self._loop.sock_recv(program, _COMMAND_MAX_BYTES - len(line))
            if not data:
                raise ConnectionAbortedError("no command came")
            line += data
        command, _, rest = line.partition(b"\n")
        found = _COMMAND.fullmatch(command)
        if found is None or int(found[1]) > PORT_MAX:
            raise ConnectionAbortedError(f"{command!r} is no CONNECT with a port")
        return int(found[1]), rest

    # --- from the guest to the host

    def _on_request(self, connection: Connection) -> bool:
        path = f"{self._path}_{connection.host_port}"
        with contextlib.ExitStack() as stack:
            try:
                program = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                stack.callback(program.close)
                program.connect(path)
            except OSError as e:  # nobody listens, or has time
                self._host.guest_log.write(log, logging.DEBUG, "%s: %s", path, e)
                return False
            stack.pop_all()
        guest = Relay()
        transport = self._host.transport(connection, guest)
        connection.accept()
        transport.on_open()
        self._start(self._join(guest, program))
        return True

    # --- both

    async def _join(self, guest: Relay, socket_: socket.socket) -> None:
        """Owns the socket, and the guest's end."""
        assert guest.transport is not None
        program = Relay(guest)
        try:
            await self._loop.create_unix_connection(lambda: program, sock=socket_)
        except BaseException:
            guest.transport.abort()
            socket_.close()
            raise
        if not program.lost.done():
            self._programs.add(program)
            program.lost.add_done_callback(lambda _: self._programs.discard(program))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(self._contained(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _contained(self, work: Coroutine[Any, Any, None]) -> None:
        """A connection that does not come about is closed, and nothing else."""
        try:
            await work
        except (OSError, AvmmError) as e:
            self._host.guest_log.write(log, logging.DEBUG, "%s: %s", self._path, e)
