"""One connection's socket: whole messages in, with their descriptors, and answers out."""

from __future__ import annotations

import array
import asyncio
import os
import socket
from dataclasses import dataclass, field

from avmm.errors import GuestFault
from avmm.loop import add_reader
from avmm.vhost_user.message import FDS_MAX, HEADER_BYTES, Header, parse_header

_FD_BYTES = array.array("i").itemsize


@dataclass(slots=True)
class Incoming:
    """A message as it came. Owns `fds`, but for those that are popped."""

    header: Header
    payload: bytes
    fds: list[int] = field(default_factory=list)

    def close(self) -> None:
        """Close the descriptors nobody took."""
        while self.fds:
            os.close(self.fds.pop())


class Closed(Exception):
    """The front-end has closed the connection; no error."""


class Channel:
    """Owns the socket, which does not block. Loop."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._loop = asyncio.get_running_loop()

    async def receive(self) -> Incoming:
        """The next message; the caller closes it.

        Raises Closed, or GuestFault("front-end") for what is no message, and keeps no descriptor
        then.
        """
        fds: list[int] = []
        try:
            header = parse_header(await self._exactly(HEADER_BYTES, fds))
            return Incoming(header, await self._exactly(header.size_bytes, fds), fds)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise

    async def send(self, data: bytes, fd: int | None = None) -> None:
        """Send an answer, with a descriptor, which stays the caller's. Raises Closed."""
        try:
            if fd is not None:
                data = data[await self._send_with(data, fd) :]
            await self._loop.sock_sendall(self._socket, data)
        except ConnectionError as e:
            raise Closed from e

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._socket.close()

    async def _send_with(self, data: bytes, fd: int) -> int:
        while True:
            try:
                return socket.send_fds(self._socket, [data], [fd])
            except BlockingIOError:
                await writable(self._socket.fileno())

    async def _exactly(self, size_bytes: int, fds: list[int]) -> bytes:
        data = b""
        while len(data) < size_bytes:
            part = await self._some(size_bytes - len(data), fds)
            if not part:
                raise Closed
            data += part
        return data

    async def _some(self, size_bytes: int, fds: list[int]) -> bytes:
        while True:
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(
                    size_bytes, socket.CMSG_SPACE(FDS_MAX * _FD_BYTES), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                await readable(self._socket.fileno())
                continue
            except ConnectionError as e:
                raise Closed from e
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    whole = len(content) - len(content) % _FD_BYTES
                    fds.extend(array.array("i", content[:whole]))
            # What the kernel had no room for it has closed.
            if flags & socket.MSG_CTRUNC or len(fds) > FDS_MAX:
                raise GuestFault(
                    "front-end", f"More than {FDS_MAX} descriptors came with a message"
                )
            return data


async def readable(fd: int) -> None:
    """Wait until `fd` is readable. Loop. Raises HostError."""
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    add_reader(loop, fd, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(fd)


async def writable(fd: int) -> None:
    """Wait until `fd` is writable. Loop."""
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    loop.add_writer(fd, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_writer(fd)
