"""The native half of a vsock device: its rings, unix sockets, and which connection is whose."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from typing import Final

from avmm.errors import GuestFault, HostError
from avmm.native import CData, ffi, lib
from avmm.vsock.connection import Connection
from avmm.vsock.packet import HEADER_BYTES, Header, parse
from avmm.vsock.reasons import Reason
from avmm.vsock.table import CLOSE_LIMIT_S, CONNECTIONS_MAX, too_many

ASK_LIMIT_S = 10.0
"""How long the guest may take to answer a program's CONNECT."""
UNREAD_MAX = 256
"""Connections that the guest has closed and whose programs have not read all of: up to 256 KiB of
ours each."""
_LOOKS_A_LIMIT: Final = 8


class Splice:
    """See native/vsock.h. Loop; from open() to close(), which follows a rest.

    To a table it is its Ring and its Names. path: of the unix sockets. announces: the home has a
    thread. fault: what to raise when the guest has broken a ring.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, fault: Callable[[], GuestFault]) -> None:
        self._loop = loop
        self._fault = fault
        self._timer: asyncio.TimerHandle | None = None
        self._look_s = min(CLOSE_LIMIT_S, ASK_LIMIT_S) / _LOOKS_A_LIMIT
        self._batch: CData = ffi.new("struct av_vsock_batch *")

    def open(
        self, home: CData, rx: CData, tx: CData, *, cid: int, path: str | None, announces: bool
    ) -> None:
        """On this home, over these rings. Raises HostError("memory")."""
        name = ffi.NULL if path is None else ffi.new("char[]", os.fsencode(path))
        setup, error = ffi.new("struct av_vsock_setup *"), ffi.new("int *")
        setup.cid, setup.path, setup.announces = cid, name, announces
        setup.ask_ns, setup.close_ns = int(ASK_LIMIT_S * 1e9), int(CLOSE_LIMIT_S * 1e9)
        setup.connections_max, setup.unread_max = CONNECTIONS_MAX, UNREAD_MAX
        self._native: CData = lib.av_vsock_create(home, rx, tx, setup, error)
        if not self._native:
            raise HostError("memory", op="vsock", errno=error[0])
        self._news: CData = lib.av_vsock_news_bits(self._native)

    def close(self) -> None:
        """End all spliced connections."""
        if self._timer is not None:
            self._timer.cancel()
        lib.av_vsock_destroy(self._native)

    @property
    def lane(self) -> CData:
        """What works on the receive and the transmit queue."""
        return lib.av_vsock_lane(self._native)

    def statistics(self) -> CData:
        """struct av_vsock_stats as of now."""
        stats = ffi.new("struct av_vsock_stats *")
        lib.av_vsock_statistics(self._native, stats)
        return stats

    # --- what the lane has to tell

    @property
    def has_news(self) -> bool:
        """Whether take_news() may have some; for a home without a thread."""
        return bool(self._news[0])

    def take_news(self) -> int:
        """av_vsock_news bits since the last call; those of time are seen to here."""
        news = int(lib.av_vsock_news(self._native))
        if news & lib.AV_VSOCK_TIMER:
            self._watch_time()
        return news

    def receive(self) -> tuple[list[Header], memoryview]:
        """Packets for Python, and their payloads one after the other, until the next call."""
        batch = self._batch
        count = lib.av_vsock_receive(self._native, batch)
        headers = ffi.buffer(batch.headers, count * HEADER_BYTES)
        return list(parse(memoryview(headers))), memoryview(ffi.buffer(batch.data, batch.bytes))

    def _watch_time(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(self._look_s, self._look)

    def _look(self) -> None:
        """End what has waited too long."""
        self._timer = None
        if self.expire():
            self._watch_time()

    def expire(self) -> int:
        """See av_vsock_expire()."""
        return int(lib.av_vsock_expire(self._native))

    # --- what goes to the guest

    def put(self, header: Header, data: memoryview) -> int:
        """See Ring. Raises GuestFault."""
        with ffi.from_buffer("uint8_t[]", data) as native:
            put = int(lib.av_vsock_put(self._native, header.pack(), native, len(data)))
        if put < 0:
            raise self._fault()
        return put

    def put_header(self, header: Header) -> bool:
        """See Ring. Raises GuestFault."""
        put = int(lib.av_vsock_put_header(self._native, header.pack()))
        if put < 0:
            raise self._fault()
        return bool(put)

    def flush(self) -> None:
        """Show the driver what was put."""
        lib.av_vsock_flush(self._native)

    # --- connections

    def claim(self, host_port: int, guest_port: int) -> bool:
        """See Names."""
        result = int(lib.av_vsock_claim(self._native, host_port, guest_port))
        if result == -errno.ENOSPC:
            raise too_many()
        if result == -errno.ENOMEM:
            raise HostError("memory", op="vsock", errno=errno.ENOMEM)
        return result == 0

    def release(self, host_port: int, guest_port: int) -> None:
        """See Names."""
        lib.av_vsock_release(self._native, host_port, guest_port)

    def serve(self, port: int, serving: bool) -> None:
        """Requests for a port of the host's are Python's, or not. Raises HostError("memory")."""
        if lib.av_vsock_serve(self._native, port, serving) < 0:
            raise HostError("memory", op="vsock", errno=errno.ENOMEM)

    def ask(self, fd: int, guest_port: int, fate: CData = ffi.NULL) -> None:
        """Join a program, whose socket is given away, to a port of the guest's, if the guest
        accepts. fate: see av_vsock_ask(). Raises HostError("vsock" | "memory")."""
        result = int(lib.av_vsock_ask(self._native, fd, guest_port, fate))
        if result == -errno.ENOSPC:
            raise too_many()
        if result < 0:
            raise HostError("memory", op="vsock", errno=-result)
        self._watch_time()  # maybe there is no driver yet, and no lane that tells

    def accept(self, fd: int, connection: Connection, fate: CData) -> bool:
        """Join a program to the guest, which asks by `connection`, and is not known to a table any
        more then; see av_vsock_accept(). Whether it came to that."""
        name, room = connection.key, connection.room
        return int(lib.av_vsock_accept(self._native, fd, *name, room, fate)) == 0

    def reset(self, reason: Reason) -> None:
        """The driver begins anew, at rest: spliced connections that it knew of end."""
        lib.av_vsock_reset(self._native, reason)
