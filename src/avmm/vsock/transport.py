"""A connection as asyncio sees it: a transport with flow control both ways."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

from avmm.vsock.connection import Events, State
from avmm.vsock.packet import CID_HOST, SHUTDOWN_BOTH, SHUTDOWN_SEND

_HIGH_BYTES: Final = 64 * 1024
_JOINED_BYTES: Final = 4096
"""Pieces that wait are joined up to this: a small one costs many times its bytes."""

Bytes = bytes | bytearray | memoryview


class Stream(Protocol):
    """A connection, wherever its device is: what Connection says of these."""

    guest_cid: int
    host_port: int
    guest_port: int
    state: State
    events: Events | None
    out_bytes: int

    def ask(self) -> None:
        """See Connection, here and below."""
        ...

    def accept(self) -> None: ...

    def write(self, data: memoryview) -> None: ...

    def shut_down(self, flags: int) -> None: ...

    def consumed(self, count: int) -> None: ...

    def reset(self) -> None: ...


class StreamTransport(asyncio.Transport):
    """Loop. What comes while reading is paused waits here, BUFFER_BYTES of it at most, and the
    guest is told of room only as the protocol takes it.

    report: told of what the protocol raises, as loop.call_exception_handler().
    opened: done when connection_made() was called; fails when the guest refuses.
    get_extra_info(): "peername" is (guest's CID, port), "sockname" (2, port).
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: Stream,
        protocol: asyncio.BaseProtocol,
        report: Callable[[dict[str, Any]], object],
    ) -> None:
        self._names = {
            "peername": (connection.guest_cid, connection.guest_port),
            "sockname": (CID_HOST, connection.host_port),
        }
        super().__init__(self._names)
        self.opened: asyncio.Future[None] = loop.create_future()
        self.lost: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self._report = report
        self._connection = connection
        self._protocol = protocol
        self._made = False
        self._closing = False
        self._lost = False
        self._paused = False
        self._backlog: deque[bytes] = deque()
        self._eof_came = self._eof_told = False
        self._over = False  # nothing more comes; `connection_lost` follows the backlog
        self._eof_written = False
        self._writing_paused = False
        self._high = _HIGH_BYTES
        self._low = _HIGH_BYTES // 4
        connection.events = self

    def __repr__(self) -> str:
        stream = self._connection
        ports = f"host:{stream.host_port} guest:{stream.guest_port}"
        return f"<StreamTransport {ports} {stream.state.value}>"

    # --- asyncio.BaseTransport, asyncio.ReadTransport

    def is_closing(self) -> bool:
        """Whether it is closed, or about to be."""
        return self._closing

    def close(self) -> None:
        """Receive no more; close when what was written has gone."""
        if self._closing:
            return
        self._closing = True
        self._drop_backlog()
        self._connection.shut_down(SHUTDOWN_BOTH)
        if not self._connection.out_bytes:
            self._lose(None)

    def abort(self) -> None:
        """Close now; the guest sees a reset."""
        self._closing = True
        self._drop_backlog()
        self._connection.reset()
        if not self.opened.done():
            self.opened.cancel()
        self._lose(None)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Another protocol from now on."""
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        """The present one."""
        return self._protocol

    def is_reading(self) -> bool:
        """Whether data_received() may be called."""
        return not self._paused and not self._closing

    def pause_reading(self) -> None:
        """No data_received() until resume_reading(). Idempotent."""
        self._paused = True

    def resume_reading(self) -> None:
        """Undo pause_reading(). Idempotent."""
        if self._paused:
            self._paused = False
            if self._backlog or self._eof_came or self._over:
                self._loop.call_soon(self._deliver)

    # --- asyncio.WriteTransport

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """As asyncio's."""
        if high is None:
            high = _HIGH_BYTES if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
        self._high, self._low = high, low
        self._check_writing()

    def get_write_buffer_size(self) -> int:
        """Bytes written and not sent yet."""
        return self._connection.out_bytes

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """(low, high)."""
        return self._low, self._high

    def write(self, data: Bytes) -> None:
        """Send bytes, in order, as the guest has room."""
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"data: a bytes-like object is needed, not {type(data).__name__!r}")
        if self._eof_written:
            raise RuntimeError("Cannot call write() after write_eof()")
        if self._closing or not data:
            return  # as asyncio has it: drain() tells
        self._connection.write(memoryview(data if type(data) is bytes else bytes(data)))
        self._check_writing()

    def can_write_eof(self) -> bool:
        """Yes: connections close half by half."""
        return True

    def write_eof(self) -> None:
        """Tell the guest that no more comes, after what was written."""
        if not self._eof_written:
            self._eof_written = True
            self._connection.shut_down(SHUTDOWN_SEND)

    # --- Events

    def on_open(self) -> None:
        """The connection stands."""
        self._names["sockname"] = (CID_HOST, self._connection.host_port)
        self._made = True
        self._call("connection_made", self)
        if not self.opened.done():
            self.opened.set_result(None)

    def on_data(self, data: memoryview) -> None:
        """Bytes of the guest's."""
        if self._closing:
            self._connection.consumed(len(data))
        elif self._paused or self._backlog:
            self._keep(data)
        else:
            self._connection.consumed(len(data))
            self._call("data_received", bytes(data))

    def on_eof(self) -> None:
        """The guest sends no more."""
        self._eof_came = True
        self._deliver()

    def on_sent(self) -> None:
        """There is less to be sent."""
        self._check_writing()
        if self._closing and not self._connection.out_bytes:
            self._lose(None)

    def on_closed(self, error: Exception | None) -> None:
        """The guest closed, or something broke."""
        if not self._made:
            self._closing = self._lost = True
            if not self.opened.done():
                self.opened.set_exception(error or ConnectionResetError("The guest closed"))
            self._settle()
        elif error is not None:
            self._closing = True
            self._drop_backlog()
            self._lose(error)
        elif self._closing:
            self._lose(None)
        else:
            self._eof_came = self._over = True
            self._deliver()

    # --- inside

    def _deliver(self) -> None:
        """Give the protocol what waits, as long as it wants it, and the end after that."""
        while self._backlog and not self._paused and not self._closing:
            data = self._backlog.popleft()
            self._connection.consumed(len(data))
            self._call("data_received", data)
        if self._backlog or self._closing:
            return
        if self._eof_came and not self._eof_told:
            self._eof_told = True
            stays = self._call("eof_received")
            if not stays and not self._over:
                self.close()
        if self._over:
            self._closing = True
            self._lose(None)

    def _keep(self, data: memoryview) -> None:
        backlog = self._backlog
        if backlog and len(backlog[-1]) + len(data) <= _JOINED_BYTES:
            backlog[-1] += data
        else:
            backlog.append(bytes(data))

    def _drop_backlog(self) -> None:
        for data in self._backlog:
            self._connection.consumed(len(data))
        self._backlog.clear()

    def _check_writing(self) -> None:
        size = self._connection.out_bytes
        if not self._writing_paused and size > self._high:
            self._writing_paused = True
            self._call("pause_writing")
        elif self._writing_paused and size <= self._low:
            self._writing_paused = False
            self._call("resume_writing")

    def _lose(self, error: Exception | None) -> None:
        """connection_lost(), once, in a turn of its own."""
        if not self._lost:
            self._lost = True
            self._loop.call_soon(self._tell_lost, error)

    def _tell_lost(self, error: Exception | None) -> None:
        if self._made:
            self._call("connection_lost", error)
        self._settle()

    def _settle(self) -> None:
        if not self.lost.done():
            self.lost.set_result(None)

    def _call(self, name: str, *arguments: object) -> Any:
        """A method of the protocol's. What it raises ends this connection, and no other."""
        try:
            return getattr(self._protocol, name)(*arguments)
        except Exception as e:
            self._report(
                {
                    "message": f"{name}() of a vsock connection's protocol failed",
                    "exception": e,
                    "transport": self,
                    "protocol": self._protocol,
                }
            )
            if name != "connection_lost":
                self.abort()
            return None
