"""One connection of a guest whose device is in another process: a socket to the lane there."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import re
import select
import socket
from collections import deque
from typing import TYPE_CHECKING, Final

from avmm.errors import AvmmError, HostError
from avmm.native import lib
from avmm.vsock.connection import Events, State
from avmm.vsock.packet import PORT_MAX, SHUTDOWN_BOTH, SHUTDOWN_SEND
from avmm.vsock.reasons import Reason, refusal, reset_error
from avmm.vsock.table import CLOSE_LIMIT_S

if TYPE_CHECKING:
    from avmm.vsock.remote import RemoteTable

_UNREAD_BYTES: Final = 64 * 1024
"""What is taken out of a socket for a reader that does not read."""
_PIECES_MAX: Final = 64
_TURN_BYTES: Final = 512 * 1024
_ANSWER: Final = re.compile(rb"OK ([0-9]{1,10})\n")
_ANSWER_MAX_BYTES: Final = 14


class RemoteConnection:
    """One of a RemoteTable's; see Connection. Loop.

    number: of the guest's request; None: we ask. Raises OSError.
    """

    def __init__(
        self,
        table: RemoteTable,
        host_port: int,
        guest_port: int,
        state: State,
        fate: int,
        number: int | None,
    ) -> None:
        self.guest_cid = table.cid
        self.host_port = host_port
        self.guest_port = guest_port
        self.state = state
        self.events: Events | None = None
        self.out_bytes = 0
        self._table = table
        self.fate = fate
        self.number = number
        kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
        self._theirs: socket.socket | None
        self._socket, self._theirs = socket.socketpair(socket.AF_UNIX, kind)
        self.fd = self._socket.fileno()
        self._events = select.EPOLLET
        try:
            table.epoll.register(self.fd, self._events)
        except OSError:
            self._socket.close()
            self._theirs.close()
            raise
        self._out: deque[memoryview] = deque()
        self._answer = b""
        self._shut = 0
        self._unread = 0
        self._ended = self._deaf = self._send_shut = False
        self._timer: asyncio.TimerHandle | None = None

    def ask(self) -> None:
        """Ask the guest to accept."""
        self._table.worker.ask(self.fate, self.guest_port, self._hand_over())
        self._watch()

    def accept(self) -> None:
        """Say yes to the guest, which asks."""
        if self.state is State.ASKING and self.number is not None:
            self.state = State.OPEN
            self._table.worker.accept(self.number, self.fate, self._hand_over())
            self._watch()

    def write(self, data: memoryview) -> None:
        """Send bytes, after those before. They must not change."""
        if self.state is not State.OPEN or self._deaf:
            return
        self._out.append(data)
        self.out_bytes += len(data)
        if not self._events & select.EPOLLOUT:
            self._flush()

    def shut_down(self, flags: int) -> None:
        """Send no more, by SHUTDOWN_SEND, after what there is to be sent; or receive no more."""
        if self.state is not State.OPEN:
            return
        self._shut |= flags
        if self._shut == SHUTDOWN_BOTH:
            self.state = State.CLOSING
            self._watch()
            self.limit_closing()
        self._check_sent()

    def consumed(self, count: int) -> None:
        """Somebody took `count` bytes that on_data() gave."""
        self._unread -= count
        self._watch()

    def reset(self) -> None:
        """End it now, without a further word to `events`."""
        if self.state is not State.DEAD:
            self._table.fates.abort(self.fate)
            self._close()

    def end(self, error: AvmmError | ConnectionError | None) -> None:
        """It is over at the other end."""
        if self.state is not State.DEAD:
            self._close()
            if self.events is not None:
                self.events.on_closed(error)

    def drop(self) -> None:
        """Nobody wants it, and the worker has not heard of it."""
        self._close()
        self._table.fates.give_back(self.fate)

    def on_events(self, events: int) -> None:
        """The socket's, as epoll has them."""
        over = select.EPOLLHUP | select.EPOLLERR
        reading = self._events & select.EPOLLIN
        if reading and events & (select.EPOLLIN | over):
            self._on_readable()
        if self._out and events & (select.EPOLLOUT | over):
            self._flush()
        if not reading and events & over and self.state is not State.DEAD:
            self._on_hang_up()

    def _on_hang_up(self) -> None:
        """The other end is closed; or both ends send no more, which looks the same."""
        ends = self._table.fates.ends(self.fate)
        if ends & lib.AV_VSOCK_CLOSED:
            if self._ended:
                self.end(None)
        elif ends & lib.AV_VSOCK_SHUT:
            self.end(self._reset_error())

    def _watch(self) -> None:
        """Ask for the events that are of use, and to be told again of room that is there."""
        reading = self.state in (State.ASKED, State.OPEN) and not self._ended
        events = select.EPOLLOUT if self._out else 0
        # A hang-up is told of whether it is wanted or not; by EPOLLET only once.
        wanted = reading and self._unread < _UNREAD_BYTES
        events |= select.EPOLLIN if wanted else select.EPOLLET
        again = self._out and events & select.EPOLLET
        if self.state is not State.DEAD and (events != self._events or again):
            self._events = events
            self._table.epoll.modify(self.fd, events)

    # --- what comes

    def _on_readable(self) -> None:
        try:
            count = self._socket.recv_into(self._table.buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            count = 0  # the other end was closed before it had read all
        data = self._table.buffer[:count]
        if not count:
            self._on_end()
        elif self.state is State.ASKED:
            self._on_answer(data)
        else:
            self._on_data(data)

    def _on_answer(self, data: memoryview) -> None:
        """The lane's word that the guest has accepted, and maybe the guest's first bytes."""
        known = len(self._answer)
        self._answer += data[: _ANSWER_MAX_BYTES - known]
        found = _ANSWER.match(self._answer)
        if found is not None and int(found[1]) <= PORT_MAX:
            self.host_port = int(found[1])
            self.state = State.OPEN
            if self.events is not None:
                self.events.on_open()
            if rest := data[found.end() - known :]:
                self._on_data(rest)
        elif b"\n" in self._answer or len(self._answer) == _ANSWER_MAX_BYTES:
            self._table.broken(HostError("worker-protocol", op="An answer to a connection"))
            self.end(ConnectionResetError(errno.ECONNRESET, "The worker broke the connection"))

    def _on_data(self, data: memoryview) -> None:
        if self.state is State.OPEN and self.events is not None:
            self._unread += len(data)
            self.events.on_data(data)
            self._watch()

    def _on_end(self) -> None:
        ends = self._table.fates.ends(self.fate)
        if self.state is State.ASKED:
            refused = ends & lib.AV_VSOCK_REFUSED
            self.end(refusal(self.guest_port) if refused else self._reset_error())
        elif ends & lib.AV_VSOCK_CLOSED:
            self.end(None)
        elif not ends & lib.AV_VSOCK_ENDED:
            self.end(self._reset_error())
        else:
            self._ended = True
            self._watch()
            if self.events is not None:
                self.events.on_eof()

    # --- what goes

    def _flush(self) -> None:
        """Give the socket what it has room for, _TURN_BYTES at most."""
        before = self.out_bytes
        try:
            while self._out and before - self.out_bytes < _TURN_BYTES:
                pieces = list(itertools.islice(self._out, _PIECES_MAX))
                self._sent(self._socket.sendmsg(pieces, (), socket.MSG_NOSIGNAL))
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as e:
            self._on_deaf(e)
        self._watch()
        if self.out_bytes < before:
            self.limit_closing()
            if self.events is not None:
                self.events.on_sent()
            self._check_sent()

    def _sent(self, count: int) -> None:
        self.out_bytes -= count
        while count:
            first = self._out.popleft()
            if count < len(first):
                self._out.appendleft(first[count:])
                return
            count -= len(first)

    def _on_deaf(self, error: OSError) -> None:
        """The other end takes no more: the guest wants none, or all is over, as is found out by
        reading what has come before that."""
        self._deaf = True
        self._drop_out()
        ends = self._table.fates.ends(self.fate)
        was_reset = ends & lib.AV_VSOCK_SHUT and not ends & lib.AV_VSOCK_CLOSED
        if was_reset:
            self._table.loop.call_soon(self._fail, self._reset_error())
        elif error.errno not in (errno.EPIPE, errno.ECONNRESET):
            failure = ConnectionResetError(errno.ECONNRESET, str(error))
            self._table.loop.call_soon(self._fail, failure)

    def _check_sent(self) -> None:
        """Do what was to be done when all is sent."""
        if self._out or self.state is State.DEAD:
            return
        if self.state is State.CLOSING:
            self._close()
        elif self._shut & SHUTDOWN_SEND and not self._send_shut:
            self._send_shut = True
            with contextlib.suppress(OSError):  # what is wrong is met by reading
                self._socket.shutdown(socket.SHUT_WR)

    def limit_closing(self) -> None:
        """Give the guest its time anew to take what is left; none passes while it rests."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.state is State.CLOSING and not self._table.rests:
            late = reset_error(Reason.LATE)
            self._timer = self._table.loop.call_later(CLOSE_LIMIT_S, self._fail, late)

    # --- the end

    def _reset_error(self) -> ConnectionResetError:
        """For what the lane ended out of turn."""
        return reset_error(self._table.fates.reason(self.fate))

    def _fail(self, error: ConnectionResetError) -> None:
        if self.state is not State.DEAD:
            self.reset()
            if self.events is not None:
                self.events.on_closed(error)

    def _drop_out(self) -> None:
        self._out.clear()
        self.out_bytes = 0

    def _hand_over(self) -> socket.socket:
        theirs, self._theirs = self._theirs, None
        assert theirs is not None
        return theirs

    def _close(self) -> None:
        self.state = State.DEAD
        self._drop_out()
        if self._timer is not None:
            self._timer.cancel()
        self._table.remove(self)
        self._socket.close()
        if self._theirs is not None:
            self._theirs.close()
