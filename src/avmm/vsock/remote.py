"""Connections of a guest whose device is in another process: each is a socket to the lane there.

What a Table and its Connections are to a VsockHost in the device's process, a RemoteTable and its
RemoteConnections are here. No packet of the guest's comes to this process: bytes do, and by Fates
how a connection ended. Of what the other process says nothing is believed.
"""

from __future__ import annotations

import asyncio
import resource
import select
import socket
from collections.abc import Callable
from typing import Final, Protocol

from avmm.errors import AvmmError, HostError
from avmm.loop import add_reader
from avmm.vsock.connection import State
from avmm.vsock.fates import FATES, Fates
from avmm.vsock.reasons import Reason, reset_error
from avmm.vsock.remote_connection import RemoteConnection
from avmm.vsock.table import Counters, too_many

_READ_BYTES: Final = 256 * 1024
_EVENTS: Final = 64
_GUESTS_SHARE: Final = 4


class Worker(Protocol):
    """The process that has the device. The sockets are its own from then on."""

    def ask(self, fate: int, port: int, ours: socket.socket) -> None:
        """Ask the guest for a connection, and join it to this socket."""
        ...

    def accept(self, number: int, fate: int, ours: socket.socket) -> None:
        """Join the guest's request of that number to this socket."""
        ...

    def forget(self, fate: int) -> bool:
        """Do not, if it has not got that socket so far; whether it had not."""
        ...


class RemoteTable:
    """See Table. Loop. broken: told when the worker says what it never would.

    Raises HostError("descriptors" | "watch").
    """

    def __init__(
        self,
        cid: int,
        loop: asyncio.AbstractEventLoop,
        worker: Worker,
        fates: Fates,
        broken: Callable[[AvmmError], None],
    ) -> None:
        self.cid = cid
        self.counters = Counters()
        self.loop = loop
        self.worker = worker
        self.fates = fates
        self.broken = broken
        self.rests = False
        self.buffer = memoryview(bytearray(_READ_BYTES))
        self._connections: dict[int, RemoteConnection] = {}
        self._on_request: Callable[[RemoteConnection], bool] = lambda connection: False
        self._closed: Reason | None = None
        self._requested = 0
        self._requested_max = guests_share()
        # One of our own for all sockets: libuv tells of an error in place of what can be read, and
        # of nothing at all that nobody wants to read or write.
        try:
            self.epoll = select.epoll()
        except OSError as e:
            raise HostError("descriptors", op="epoll_create", errno=e.errno) from e
        self._watched: dict[int, RemoteConnection] = {}
        try:
            add_reader(loop, self.epoll.fileno(), self._on_events)
        except BaseException:
            self.epoll.close()
            raise

    def __len__(self) -> int:
        return len(self._connections)

    def answer_by(self, on_request: Callable[[RemoteConnection], bool]) -> None:
        """See Table, here and below."""
        self._on_request = on_request

    def check_open(self) -> None:
        if self._closed is not None:
            raise reset_error(self._closed)

    def ask(self, guest_port: int) -> RemoteConnection:
        self.check_open()
        return self._add(0, guest_port, State.ASKED, None)

    def close(self, reason: Reason) -> None:
        if self._closed is not None:
            return
        self._closed = reason
        for connection in tuple(self._connections.values()):
            connection.end(reset_error(reason))
        self.loop.remove_reader(self.epoll.fileno())
        self.epoll.close()

    def hold(self) -> None:
        self.rests = True
        self._limit_all()

    def resume(self) -> None:
        self.rests = False
        self._limit_all()

    # --- the worker

    def request(self, number: int, host_port: int, guest_port: int) -> bool:
        """The guest asks; whether anybody is there. Raises HostError("vsock" | "descriptors")."""
        if self._requested >= self._requested_max:
            raise too_many(self._requested_max)
        connection = self._add(host_port, guest_port, State.ASKING, number)
        self._requested += 1
        if self._on_request(connection):
            return True
        connection.drop()
        return False

    def decline(self, fate: int, error: AvmmError | None) -> None:
        """What was handed over for a connection of this fate comes to nothing.

        error: why, for who connects; None: the guest does not ask any more. Raises
        HostError("worker-protocol").
        """
        if connection := self._connections.get(fate):
            tells = connection.state is State.ASKED and isinstance(error, HostError)
            connection.end(error if tells else reset_error(Reason.GUEST_RESET))
        if not self.fates.give_back(fate):
            raise HostError("worker-protocol", op="An answer for no connection")

    def _limit_all(self) -> None:
        for connection in self._connections.values():
            connection.limit_closing()

    # --- for its connections

    def remove(self, connection: RemoteConnection) -> None:
        """It is no more, and its socket is closed next."""
        del self._watched[connection.fd]
        self.epoll.unregister(connection.fd)
        del self._connections[connection.fate]
        self.fates.leave(connection.fate)
        if self.worker.forget(connection.fate):
            self.fates.give_back(connection.fate)
        self._requested -= connection.number is not None

    def _on_events(self) -> None:
        for fd, events in self.epoll.poll(0, _EVENTS):
            if connection := self._watched.get(fd):
                connection.on_events(events)

    def _add(
        self, host_port: int, guest_port: int, state: State, number: int | None
    ) -> RemoteConnection:
        fate = self.fates.take()
        if fate is None:
            raise too_many(FATES)
        try:
            connection = RemoteConnection(self, host_port, guest_port, state, fate, number)
        except OSError as e:
            self.fates.leave(fate)
            self.fates.give_back(fate)
            raise HostError("descriptors", op="socketpair", errno=e.errno) from e
        self._connections[fate] = self._watched[connection.fd] = connection
        return connection


def guests_share() -> int:
    """Connections by which a guest may use descriptors of ours: not nearly all of them."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return FATES if most == resource.RLIM_INFINITY else min(FATES, most // _GUESTS_SHARE)
