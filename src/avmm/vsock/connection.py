"""One stream between host and guest: its states and packets (virtio 1.3 section 5.10.6.5).

Knows neither asyncio nor rings: packets come by receive() and go by send(), and what happens is
told to `Events`.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from avmm.vsock.credit import BUFFER_BYTES, Credit
from avmm.vsock.packet import (
    CID_HOST,
    SHUTDOWN_BOTH,
    SHUTDOWN_RECEIVE,
    SHUTDOWN_SEND,
    TYPE_STREAM,
    Header,
    Op,
)
from avmm.vsock.reasons import Reason, refusal, reset_error

SLICE_BYTES: Final = 64 * 1024
"""What one connection sends before another has its turn."""

NO_ROOM: Final = -1

Data = bytes | memoryview


class Ring(Protocol):
    """Where packets to the guest go."""

    def put(self, header: Header, data: memoryview) -> int:
        """In as many packets as are needed; how many bytes found room."""
        ...

    def put_header(self, header: Header) -> bool:
        """A packet without payload; whether it found room."""
        ...


class Events(Protocol):
    """What a connection tells whoever uses it."""

    def on_open(self) -> None:
        """The guest accepted."""
        ...

    def on_data(self, data: memoryview) -> None:
        """Bytes came, valid during the call. consumed() says when somebody took them."""
        ...

    def on_eof(self) -> None:
        """The guest sends no more."""
        ...

    def on_sent(self) -> None:
        """The guest took some of what was to be sent, or wants no more of it."""
        ...

    def on_closed(self, error: Exception | None) -> None:
        """It is over, with nothing to come but what came before; None: the guest closed it."""
        ...


class State(enum.Enum):
    """ASKED: we asked the guest. ASKING: the guest asks us. CLOSING: we have closed, and wait for
    the guest to do so. DEAD: a reset is all that is to be sent, if anything."""

    ASKED = "asked"
    ASKING = "asking"
    OPEN = "open"
    CLOSING = "closing"
    DEAD = "dead"


_REQUEST, _RESPONSE, _RST, _SHUTDOWN, _CREDIT = (1 << bit for bit in range(5))
_OPENINGS = ((_REQUEST, Op.REQUEST), (_RESPONSE, Op.RESPONSE))


class Connection:
    """One of a VsockHost's. host_port and guest_port know it apart from all others.

    wake: called when there is something to send. queued: it is among those that have.
    """

    __slots__ = (
        "_credit",
        "_guest_shut",
        "_out",
        "_pending",
        "_shut",
        "_wake",
        "events",
        "guest_cid",
        "guest_port",
        "host_port",
        "out_bytes",
        "queued",
        "state",
    )

    def __init__(
        self,
        guest_cid: int,
        host_port: int,
        guest_port: int,
        state: State,
        wake: Callable[[Connection], None],
    ) -> None:
        self.guest_cid = guest_cid
        self.host_port = host_port
        self.guest_port = guest_port
        self.state = state
        self.events: Events | None = None
        self.queued = False
        self.out_bytes = 0
        self._wake = wake
        self._out: deque[memoryview] = deque()
        self._credit = Credit()
        self._pending = 0
        self._shut = 0
        self._guest_shut = 0

    @property
    def key(self) -> tuple[int, int]:
        """(host_port, guest_port)."""
        return self.host_port, self.guest_port

    @property
    def room(self) -> int:
        """How many bytes the guest takes now."""
        return self._credit.room

    @property
    def is_asked(self) -> bool:
        """Whether the guest has seen that we ask."""
        return not self._pending & _REQUEST

    # --- what its user does

    def ask(self) -> None:
        """Ask the guest to accept."""
        self._want(_REQUEST)

    def accept(self) -> None:
        """Say yes to the guest, which asks; nothing when it asks no more."""
        if self.state is State.ASKING:
            self.state = State.OPEN
            self._want(_RESPONSE)

    def write(self, data: memoryview) -> None:
        """Send bytes, after those before. They must not change."""
        if self.state is not State.OPEN or self._guest_shut & SHUTDOWN_RECEIVE:
            return
        self._out.append(data)
        self.out_bytes += len(data)
        self._want(0)

    def shut_down(self, flags: int) -> None:
        """Send no more, by SHUTDOWN_SEND, after what there is to be sent; or receive no more."""
        if self.state is State.OPEN:
            self._shut |= flags
            if self._shut == SHUTDOWN_BOTH:
                self.state = State.CLOSING
            self._want(_SHUTDOWN)

    def consumed(self, count: int) -> None:
        """Somebody took `count` bytes that on_data() gave."""
        self._credit.forward(count)
        if self._credit.update_due and self.state is State.OPEN:
            self._want(_CREDIT)

    def reset(self) -> None:
        """End it now, without a further word to `events`."""
        if self.state is State.DEAD:
            return
        known = self.state is not State.ASKED or self.is_asked
        self._die(_RST if known else 0)

    def fail(self, error: ConnectionError) -> None:
        """End it now."""
        if self.state is not State.DEAD:
            self.reset()
            self._tell_closed(error)

    def forget(self, error: ConnectionError) -> None:
        """It is gone at the guest's end too: send nothing."""
        if self.state is not State.DEAD:
            self._die(0)
            self._tell_closed(error)
        self._pending = 0

    def leave(self) -> None:
        """Its packets are somebody else's from now on."""
        self.state = State.DEAD
        self._pending = 0

    # --- what comes of the guest

    def hear(self, header: Header) -> None:
        """The packet by which the guest asks us."""
        self._credit.hear(header.buf_alloc, 0)

    def receive(self, header: Header, payload: memoryview) -> None:
        """A packet of the guest's for this connection. A broken one ends it."""
        if self.state is State.DEAD:
            return
        op = header.op
        if op == Op.RST:
            self._on_reset()
        elif not self._credit.hear(header.buf_alloc, header.fwd_cnt):
            self._violated(Reason.UNSENT)
        elif op == Op.RW:
            self._on_data(payload)
        elif op == Op.CREDIT_UPDATE:
            pass
        elif op == Op.CREDIT_REQUEST:
            self._want(_CREDIT)
        elif op == Op.SHUTDOWN:
            self._on_shutdown(header.flags & SHUTDOWN_BOTH)
        elif op == Op.RESPONSE and self.state is State.ASKED and self.is_asked:
            self.state = State.OPEN
            if self.events is not None:
                self.events.on_open()
        else:
            self._violated(Reason.OPERATION)
        if self.out_bytes and self.state is not State.DEAD:
            self._want(0)  # there may be credit now

    def _on_data(self, payload: memoryview) -> None:
        if self.state is State.CLOSING:
            return  # on its way when we closed
        if self.state is not State.OPEN or self._guest_shut & SHUTDOWN_SEND:
            self._violated(Reason.DATA)
        elif not self._credit.receive(len(payload)):
            self._violated(Reason.NO_ROOM)
        elif self.events is not None and payload:
            self.events.on_data(payload)

    def _on_shutdown(self, flags: int) -> None:
        if self.state not in (State.OPEN, State.CLOSING):
            self._violated(Reason.SHUTDOWN)
            return
        fresh = flags & ~self._guest_shut
        self._guest_shut |= flags
        if self._guest_shut == SHUTDOWN_BOTH:
            # The guest has closed, and waits for this answer.
            self._die(_RST)
            self._tell_closed(None)
            return
        if fresh & SHUTDOWN_RECEIVE:
            self._drop_out()
        if fresh & SHUTDOWN_SEND and self.events is not None:
            self.events.on_eof()

    def _on_reset(self) -> None:
        closing = self.state is State.CLOSING
        refused = self.state is State.ASKED
        self._die(0)
        if closing:
            self._tell_closed(None)
        elif refused:
            self._tell_closed(refusal(self.guest_port))
        else:
            self._tell_closed(reset_error(Reason.GUEST_RESET))

    def _violated(self, reason: Reason) -> None:
        self.fail(reset_error(reason))

    def _tell_closed(self, error: ConnectionError | None) -> None:
        if self.events is not None:
            self.events.on_closed(error)

    # --- what goes to the guest

    @property
    def has_work(self) -> bool:
        """Whether send() would do something, if there was room."""
        if self._pending & ~_SHUTDOWN:
            return True
        if self.out_bytes:
            return self.state in (State.OPEN, State.CLOSING) and self._credit.room > 0
        return bool(self._pending)

    def send(self, ring: Ring) -> int:
        """Send what is due, SLICE_BYTES at most; how many bytes, or NO_ROOM: the ring is full."""
        if self._pending & _RST:
            return 0 if self._put(ring, _RST, Op.RST) else NO_ROOM
        for what, op in _OPENINGS:
            if self._pending & what and not self._put(ring, what, op):
                return NO_ROOM
        sent = self._send_data(ring) if self._out else 0
        if sent == NO_ROOM:
            return NO_ROOM
        ends = self._pending & _SHUTDOWN and not self._out
        if ends and not self._put(ring, _SHUTDOWN, Op.SHUTDOWN):
            return NO_ROOM
        if self._pending & _CREDIT and not self._put(ring, _CREDIT, Op.CREDIT_UPDATE):
            return NO_ROOM
        return sent

    def _send_data(self, ring: Ring) -> int:
        sent = 0
        full = False
        while self._out and not full and (limit := self._limit(sent)) > 0:
            chunk = self._next_chunk()
            piece = chunk[:limit]
            count = ring.put(self._header(Op.RW), piece)
            full = count < len(piece)
            if count:
                self._credit.send(count)
                self._told()
                sent += count
            if count == len(chunk):
                self._out.popleft()
            else:
                self._out[0] = chunk[count:]
        if sent:
            self.out_bytes -= sent
            if self.events is not None:
                self.events.on_sent()
        return NO_ROOM if full else sent

    def _limit(self, sent: int) -> int:
        if self.state not in (State.OPEN, State.CLOSING):
            return 0
        return min(SLICE_BYTES - sent, self._credit.room)

    def _next_chunk(self) -> memoryview:
        """The first of what is to be sent; many small pieces become one."""
        out = self._out
        if len(out) > 1 and len(out[0]) + len(out[1]) <= SLICE_BYTES:
            pieces = [out.popleft()]
            size = len(pieces[0])
            while out and size + len(out[0]) <= SLICE_BYTES:
                size += len(out[0])
                pieces.append(out.popleft())
            out.appendleft(memoryview(b"".join(pieces)))
        return out[0]

    def _put(self, ring: Ring, what: int, op: Op) -> bool:
        if not ring.put_header(self._header(op, self._shut if op is Op.SHUTDOWN else 0)):
            return False
        self._pending &= ~what
        self._told()
        return True

    def _told(self) -> None:
        """A packet went, and with it our counters."""
        self._credit.tell()
        self._pending &= ~_CREDIT

    def _header(self, op: Op, flags: int = 0) -> Header:
        return Header(
            CID_HOST,
            self.guest_cid,
            self.host_port,
            self.guest_port,
            0,
            TYPE_STREAM,
            op,
            flags,
            BUFFER_BYTES,
            self._credit.forwarded,
        )

    def _drop_out(self) -> None:
        if self._out:
            self._out.clear()
            self.out_bytes = 0
            if self.events is not None:
                self.events.on_sent()

    def _die(self, pending: int) -> None:
        self.state = State.DEAD
        self._out.clear()
        self.out_bytes = 0
        self._pending = pending
        self._wake(self)

    def _want(self, what: int) -> None:
        self._pending |= what
        self._wake(self)
