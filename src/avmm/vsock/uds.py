"""The unix socket by which programs of the host reach the guest, by Firecracker's convention.

A program connects to PATH, writes "CONNECT port\\n", reads "OK hostport\\n", and then talks to the
guest's program at that port. The other way is native: what a program of the guest connects to, at
port P of CID 2, is the unix socket PATH_P, where no Python code serves that port.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import Callable
from typing import Final

from avmm.errors import AvmmError, HostError
from avmm.log import GuestLog
from avmm.loop import add_reader
from avmm.unixsocket import Listener
from avmm.vsock.packet import PORT_MAX

log = logging.getLogger(__name__)

_COMMAND: Final = re.compile(rb"CONNECT ([0-9]{1,10})\r?\n")
_COMMAND_MAX_BYTES: Final = 32
_COMMAND_LIMIT_S: Final = 60.0
_WAITING_MAX: Final = 1024
"""Programs that have connected and have not said what they want."""
_ACCEPTED_A_TURN: Final = 16

_REST_S = 1.0
"""Between attempts to take a connection for which the host has no descriptor."""


class _Program:
    """One that has connected, and what it has written of its command."""

    def __init__(self, socket_: socket.socket) -> None:
        self.socket = socket_
        self.line = b""
        self.timer: asyncio.TimerHandle | None = None

    def read_port(self) -> int | None:
        """The port it wants; None: it has not said yet. What comes after its command stays in the
        socket. Raises OSError."""
        while True:
            try:
                data = self.socket.recv(_COMMAND_MAX_BYTES - len(self.line), socket.MSG_PEEK)
            except BlockingIOError:
                return None
            if not data:
                raise ConnectionAbortedError("no command came")
            self.line += self.socket.recv(data.find(b"\n") + 1 or len(data))
            if self.line.endswith(b"\n"):
                break
            if len(self.line) == _COMMAND_MAX_BYTES:
                raise ConnectionAbortedError(f"{self.line!r}... is no command")
        found = _COMMAND.fullmatch(self.line)
        if found is None or int(found[1]) > PORT_MAX:
            raise ConnectionAbortedError(f"{self.line!r} is no CONNECT with a port")
        return int(found[1])


class UnixSocket:
    """Listens at PATH, and finds out what programs want. Loop. Owns PATH, and all programs until
    `ask` takes them.

    ask: called with a program's socket, which is its own from then on, and the port of the guest's.
    Raises ConfigError("socket") or HostError when PATH cannot be had.
    """

    def __init__(
        self,
        path: str,
        ask: Callable[[socket.socket, int], None],
        guest_log: GuestLog,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._path = path
        self._ask = ask
        self._guest_log = guest_log
        self._loop = loop
        self._listener = Listener(path)
        self._waiting: set[_Program] = set()
        self._resting: asyncio.TimerHandle | None = None
        try:
            self._listen()
        except BaseException:
            self._listener.close()
            raise

    def close(self) -> None:
        """End what waits, and remove PATH."""
        if self._resting is not None:
            self._resting.cancel()
        self._loop.remove_reader(self._listener.socket.fileno())
        self._listener.close()
        for program in tuple(self._waiting):
            self._forget(program)
            program.socket.close()

    def _listen(self) -> None:
        add_reader(self._loop, self._listener.socket.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(_ACCEPTED_A_TURN):
            try:
                accepted = self._listener.accept()
            except HostError as e:
                # It stays where it is, so without a rest the loop would do nothing else.
                self._guest_log.write(log, logging.WARNING, "vsock: %s", e)
                self._loop.remove_reader(self._listener.socket.fileno())
                self._resting = self._loop.call_later(_REST_S, self._listen)
                return
            if accepted is None:
                return
            program = _Program(accepted)
            # Most have written their command by now.
            if not self._serve(program):
                self._wait(program)

    def _serve(self, program: _Program) -> bool:
        """Whether it is done with: joined, or closed because it cannot be."""
        try:
            port = program.read_port()
            if port is None:
                return False
            self._forget(program)
            self._ask(program.socket, port)
        except (OSError, AvmmError) as e:
            self._end(program, e)
        return True

    def _wait(self, program: _Program) -> None:
        if len(self._waiting) >= _WAITING_MAX:
            program.socket.close()
            return
        try:
            add_reader(self._loop, program.socket.fileno(), self._serve, program)
        except HostError as e:
            self._end(program, e)
            return
        late = ConnectionAbortedError(f"no command came in {_COMMAND_LIMIT_S:g} s")
        program.timer = self._loop.call_later(_COMMAND_LIMIT_S, self._end, program, late)
        self._waiting.add(program)

    def _forget(self, program: _Program) -> None:
        if program.timer is not None:
            program.timer.cancel()
            program.timer = None
            self._loop.remove_reader(program.socket.fileno())
            self._waiting.discard(program)

    def _end(self, program: _Program, why: Exception) -> None:
        """A connection that does not come about is closed, and nothing else."""
        self._guest_log.write(log, logging.DEBUG, "%s: %s", self._path, why)
        self._forget(program)
        program.socket.close()
