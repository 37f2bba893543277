"""One connection to the agent: frames, the greeting, and errors by their names."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from typing import NoReturn

from avmm.agent import protocol
from avmm.agent.protocol import HEAD, Type, nonsense
from avmm.errors import HostError

Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
"""Opens a stream to the agent's port."""


class Connection:
    """Frames over a pair of streams. One operation at a time; loop thread."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._greeted = False
        self.settled = True
        """No operation is under way: the connection can serve the next."""
        self._send(Type.HELLO, protocol.pack_hello())

    @property
    def usable(self) -> bool:
        """Whether the other side is still there, as far as is known, and said nothing unasked."""
        return not (
            self._reader.at_eof()
            or self._reader.exception() is not None
            or self._writer.is_closing()
            or self._writer.transport.is_closing()
        )

    def send(self, type: Type, payload: bytes = b"") -> None:
        """Queue a frame of an operation."""
        self.settled = False
        self._send(type, payload)

    def _send(self, type: Type, payload: bytes) -> None:
        self._writer.write(HEAD.pack(len(payload), type) + payload)

    async def drain(self) -> None:
        """Wait until the frames queued are few. Raises HostError("agent-lost")."""
        try:
            await self._writer.drain()
        except (OSError, HostError) as e:
            raise lost() from e

    async def receive(self) -> tuple[Type, bytes]:
        """The next frame.

        Raises GuestFault("agent-protocol"), HostError("agent-lost" | "agent-version").
        """
        type, payload = await self._receive()
        if self._greeted:
            return type, payload
        if type is Type.ERROR:  # it has no room for us
            _raise_error(payload)
        protocol.check_hello(type, payload)
        self._greeted = True
        return await self._receive()

    async def request(self, type: Type, payload: bytes = b"") -> bytes:
        """Send a request and wait for its answer; the payload of its OK.

        Raises OSError with the guest's errno, and as receive().
        """
        self.send(type, payload)
        answer = await self.expect(Type.OK)
        self.settled = True
        return answer

    async def part(self) -> bytes:
        """The next piece of a stream of DATA frames; empty at its END."""
        type, payload = await self.receive()
        if type is Type.ERROR:
            self._raise(payload)
        if type is Type.END:
            self.settled = True
            return b""
        if type is not Type.DATA or not payload:
            raise nonsense(f"{type.name} of {len(payload)} bytes within a file")
        return payload

    async def expect(self, *types: Type) -> bytes:
        """The payload of the next frame, which is of one of these types or an error."""
        type, payload = await self.receive()
        if type is Type.ERROR:
            self._raise(payload)
        if type not in types:
            raise nonsense(f"{type.name} instead of {' or '.join(t.name for t in types)}")
        return payload

    def abort(self) -> None:
        """Give the connection up, and with it what the agent does for us."""
        self._writer.transport.abort()

    def _raise(self, payload: bytes) -> NoReturn:
        self.settled = True
        _raise_error(payload)

    async def _receive(self) -> tuple[Type, bytes]:
        try:
            size, type = protocol.parse_head(await self._reader.readexactly(HEAD.size))
            return type, await self._reader.readexactly(size) if size else b""
        except (OSError, EOFError, HostError) as e:
            raise lost() from e


def lost() -> HostError:
    """The error for an agent that is gone."""
    return HostError(
        "agent-lost",
        op="The guest's agent",
        remedy="the connection ended; the agent died, or the guest is going down",
    )


def _raise_error(payload: bytes) -> NoReturn:
    number, what = protocol.unpack_error(payload)
    if number == errno.EAGAIN and what == "too many connections":
        raise HostError(
            "agent-busy", op="The guest's agent", remedy="it serves 256 connections already"
        )
    raise OSError(number, os.strerror(number), what)
