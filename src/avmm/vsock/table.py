"""All connections of one guest: which packet is for which, and who has something to send."""

from __future__ import annotations

import asyncio
import enum
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from avmm.errors import HostError
from avmm.vsock.connection import NO_ROOM, SLICE_BYTES, Connection, Ring, State
from avmm.vsock.packet import CID_HOST, TYPE_STREAM, Header, Op, reset_for
from avmm.vsock.reasons import Reason, reset_error

CONNECTIONS_MAX: Final = 8192
_REPLIES_MAX: Final = 256
_TURN_BYTES: Final = 8 * SLICE_BYTES
_TURN_PACKETS: Final = 512
CLOSE_LIMIT_S: Final = 8.0
"""How long the guest may go on without closing its end, or taking anything, after we closed."""
_FIRST_PORT: Final = 1 << 30
_PORTS: Final = 1 << 30


class Sent(enum.Enum):
    """What came of Table.send()."""

    ALL = "all"
    MORE = "more"
    NO_ROOM = "no room"


@dataclass(slots=True)
class Counters:
    """Since the device was made. opened: connections; refused: by either end, or for lack of room;
    strayed: packets of the guest's for nobody; resets: of the device by its driver."""

    opened: int = 0
    refused: int = 0
    strayed: int = 0
    rx_packets: int = 0
    rx_bytes: int = 0
    resets: int = 0


class Names(Protocol):
    """Which pairs of ports are in use, by anybody."""

    def claim(self, host_port: int, guest_port: int) -> bool:
        """Take a pair; False when it is taken. Raises HostError("vsock") beyond what there may
        be."""
        ...

    def release(self, host_port: int, guest_port: int) -> None:
        """Give it back."""
        ...


class Table:
    """Loop. on_work: called when there is something to send, maybe many times.

    names: shared with connections that are not in this table; None: there are none.
    """

    def __init__(
        self,
        cid: int,
        loop: asyncio.AbstractEventLoop,
        on_work: Callable[[], None],
        names: Names | None = None,
    ) -> None:
        self.cid = cid
        self.counters = Counters()
        self._loop = loop
        self._on_work = on_work
        self._on_request: Callable[[Connection], bool] = _nobody
        self._names = names
        self._connections: dict[tuple[int, int], Connection] = {}
        self._ready: deque[Connection] = deque()
        self._replies: deque[Header] = deque()
        self._closing: dict[Connection, asyncio.TimerHandle | None] = {}
        self._rests = False
        self._ports = itertools.count()
        self._closed: Reason | None = None

    def __len__(self) -> int:
        return len(self._connections)

    @property
    def has_room_for_replies(self) -> bool:
        """Whether another packet may be taken from the guest: each may need an answer."""
        return len(self._replies) < _REPLIES_MAX

    # --- the host's programs

    def answer_by(self, on_request: Callable[[Connection], bool]) -> None:
        """Who decides about a guest that asks: it gets a connection to accept() or reset(), and
        says whether anybody is there."""
        self._on_request = on_request

    def hand_over(self, connection: Connection) -> None:
        """It has come into other hands, with its name."""
        self._connections.pop(connection.key)
        connection.leave()

    def check_open(self) -> None:
        """Raises ConnectionResetError after close()."""
        if self._closed is not None:
            raise reset_error(self._closed)

    def ask(self, guest_port: int) -> Connection:
        """A new connection from a free port of ours. It asks the guest once ask() is called.

        Raises HostError("vsock") when there are too many, ConnectionResetError at the end.
        """
        self.check_open()
        if len(self._connections) >= CONNECTIONS_MAX:
            raise too_many()
        while True:
            port = _FIRST_PORT + next(self._ports) % _PORTS
            if (port, guest_port) not in self._connections and self._claim(port, guest_port):
                return self._add(port, guest_port, State.ASKED)

    # --- the guest

    def receive(self, headers: list[Header], data: memoryview) -> None:
        """Packets of the guest's, and their payloads one after the other."""
        counters = self.counters
        counters.rx_packets += len(headers)
        counters.rx_bytes += len(data)
        at = 0
        for header in headers:
            end = at + header.size_bytes
            self._receive(header, data[at:end])
            at = end

    def _receive(self, header: Header, payload: memoryview) -> None:
        if header.src_cid != self.cid:
            self.counters.strayed += 1  # nobody it could be answered to
            return
        # A packet to another guest is answered as one to a port where nobody listens: this host
        # joins no guests, and one that hears nothing would wait until it gives up.
        understood = header.dst_cid == CID_HOST and header.type == TYPE_STREAM
        connection = None
        if understood:
            connection = self._connections.get((header.dst_port, header.src_port))
        if connection is not None:
            connection.receive(header, payload)
        elif understood and header.op == Op.REQUEST:
            self._on_asked(header)
        elif header.op != Op.RST:
            self.counters.strayed += 1
            self._reply(reset_for(header))

    def _on_asked(self, header: Header) -> None:
        if self._may_be_asked(header):
            connection = self._add(header.dst_port, header.src_port, State.ASKING)
            connection.hear(header)
            if self._on_request(connection):
                return
            self._remove(connection)
        self.counters.refused += 1
        self._reply(reset_for(header))

    def _reply(self, header: Header) -> None:
        self._replies.append(header)
        self._on_work()

    def send(self, ring: Ring) -> Sent:
        """Send what is due, in turns, a bounded amount."""
        while self._replies:
            if not ring.put_header(self._replies[0]):
                return Sent.NO_ROOM
            self._replies.popleft()
        bytes_left, packets_left = _TURN_BYTES, _TURN_PACKETS
        while self._ready and bytes_left > 0 and packets_left > 0:
            connection = self._ready[0]
            sent = connection.send(ring)
            if sent == NO_ROOM:
                return Sent.NO_ROOM
            bytes_left -= sent
            packets_left -= 1
            self._ready.popleft()
            connection.queued = False
            self._wake(connection)
        return Sent.MORE if self._ready else Sent.ALL

    def reset(self, reason: Reason) -> None:
        """The driver begins anew: what it knew of is gone. What it was not asked yet stays."""
        self.counters.resets += 1
        self._replies.clear()
        for connection in tuple(self._connections.values()):
            if connection.state is not State.ASKED or connection.is_asked:
                connection.forget(reset_error(reason))
                self._remove(connection)

    def close(self, reason: Reason) -> None:
        """End all connections, and be asked for none any more. Idempotent."""
        self._closed = reason
        self._replies.clear()
        for connection in tuple(self._connections.values()):
            connection.forget(reset_error(reason))
            self._remove(connection)
        self._ready.clear()

    # --- the guest

    def hold(self) -> None:
        """It can close nothing, nor take anything, and is given no time for it."""
        self._rests = True
        self._limit_all()

    def resume(self) -> None:
        """It can again, and all its time begins anew."""
        self._rests = False
        self._limit_all()

    # --- inside

    def _limit_all(self) -> None:
        for connection, timer in self._closing.items():
            if timer is not None:
                timer.cancel()
            self._closing[connection] = self._limit(connection)

    def _limit(self, connection: Connection) -> asyncio.TimerHandle | None:
        late = reset_error(Reason.LATE)
        return None if self._rests else self._loop.call_later(CLOSE_LIMIT_S, connection.fail, late)

    def _may_be_asked(self, header: Header) -> bool:
        if self._closed is not None or len(self._connections) >= CONNECTIONS_MAX:
            return False
        try:
            return self._claim(header.dst_port, header.src_port)
        except HostError:
            return False

    def _claim(self, host_port: int, guest_port: int) -> bool:
        return self._names is None or self._names.claim(host_port, guest_port)

    def _add(self, host_port: int, guest_port: int, state: State) -> Connection:
        connection = Connection(self.cid, host_port, guest_port, state, self._wake)
        self._connections[connection.key] = connection
        return connection

    def _remove(self, connection: Connection) -> None:
        if self._connections.get(connection.key) is connection:
            del self._connections[connection.key]
            if self._names is not None:
                self._names.release(*connection.key)
        if timer := self._closing.pop(connection, None):
            timer.cancel()

    def _wake(self, connection: Connection) -> None:
        """Something about it changed."""
        if connection.has_work:
            if self._closing and (timer := self._closing.pop(connection, None)):
                timer.cancel()
            if not connection.queued:
                connection.queued = True
                self._ready.append(connection)
                self._on_work()
        elif connection.state is State.DEAD:
            self._remove(connection)
        elif connection.state is State.CLOSING and connection not in self._closing:
            self._closing[connection] = self._limit(connection)


def too_many(most: int = CONNECTIONS_MAX) -> HostError:
    """For one connection more than there may be."""
    return HostError("vsock", op="connect", remedy=f"it has {most} connections; close some")


def _nobody(connection: Connection) -> bool:
    return False
