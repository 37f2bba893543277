"""The program's side of an isolated guest's vsock: its host, and sockets that go to the worker.

The program makes every pair of sockets, and keeps an end that no other process has: a worker that
is not ours any more may say anything through its own, and can do nothing to ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Final

import msgspec

from avmm.errors import AvmmError, HostError
from avmm.log import GuestLog
from avmm.machine.config import Config
from avmm.machine.isolation import messages as say
from avmm.virtio.devices.vsock import Vsock
from avmm.vsock.fates import Fates
from avmm.vsock.host import VsockHost
from avmm.vsock.remote import RemoteTable, guests_share
from avmm.vsock.table import too_many
from avmm.vsock.uds import UnixSocket

log = logging.getLogger(__name__)

_ON_THEIR_WAY_MAX: Final = 32
"""A worker that takes nothing keeps so many in the kernel, which counts them against our user."""
_WAY_BYTES: Final = _ON_THEIR_WAY_MAX * 1024
"""Of the kernel's memory, which takes twice that: one that only says it took them gets few more."""
_REFUSED_BEHIND_BYTES: Final = 1 << 20


def vsock_of(config: Config) -> Vsock | None:
    """The one there is."""
    for _, device in config.all_devices():
        if isinstance(device, Vsock):
            return device
    return None


class _Handing:
    """Sockets on their way to the worker, each with a record. Owns all it is given, and `way`.

    on_lost: told of a record whose socket the kernel did not take.
    """

    def __init__(self, way: socket.socket, on_lost: Callable[[say.Handed, HostError], None]):
        self._way = way
        self._on_lost = on_lost
        self._waiting: OrderedDict[object, tuple[say.Handed, socket.socket]] = OrderedDict()
        self._waiting_max = guests_share()
        self._on_their_way = 0

    def hand(self, record: say.Handed, theirs: socket.socket) -> None:
        """In order, as the worker takes them. Raises HostError("vsock") when too many wait that
        the program itself did not ask for."""
        ours = isinstance(record, say.Ask) and record.fate is not None
        if not ours and len(self._waiting) >= self._waiting_max:
            theirs.close()
            raise too_many(self._waiting_max)
        self._waiting[object() if record.fate is None else record.fate] = record, theirs
        self._send()

    def take_back(self, fate: int) -> say.Handed | None:
        """The record of this fate, if it still waits; its socket is closed."""
        if fate not in self._waiting:
            return None
        record, theirs = self._waiting.pop(fate)
        theirs.close()
        return record

    def on_took(self) -> None:
        """The worker has one. Raises HostError("worker-protocol")."""
        if not self._on_their_way:
            raise HostError("worker-protocol", op="A socket that was not on its way")
        self._on_their_way -= 1
        self._send()

    def close(self) -> None:
        """Close all."""
        for _, theirs in self._waiting.values():
            theirs.close()
        self._waiting.clear()
        self._way.close()

    def _send(self) -> None:
        while self._waiting and self._on_their_way < _ON_THEIR_WAY_MAX:
            _, (record, theirs) = self._waiting.popitem(last=False)
            with theirs:
                try:
                    socket.send_fds(self._way, [msgspec.msgpack.encode(record)], [theirs.fileno()])
                except OSError as e:
                    # A worker that has died has its own way to tell.
                    if e.errno not in (errno.EPIPE, errno.ECONNRESET):
                        self._on_lost(record, HostError("descriptors", op="send", errno=e.errno))
                else:
                    self._on_their_way += 1


class Sockets:
    """Loop. Owned by `stack`, but for theirs(). line: to the worker. broken: told when it says what
    it never would.

    Raises ConfigError("socket"), HostError("descriptors" | "memory" | "watch").
    """

    def __init__(
        self,
        config: Vsock,
        line: say.Line,
        guest_log: GuestLog,
        broken: Callable[[AvmmError], None],
        stack: AsyncExitStack,
    ) -> None:
        loop = asyncio.get_running_loop()
        self._uds = config.uds
        self._line = line
        self._guest_log = guest_log
        self._served: set[int] = set()
        self._fates = Fates()
        stack.callback(self._fates.close)
        with contextlib.ExitStack() as opened:
            opened.callback(os.close, self._fates.fd)
            try:
                way, self._there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            except OSError as e:
                raise HostError("descriptors", op="socketpair", errno=e.errno) from e
            opened.callback(self._there.close)
            way.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _WAY_BYTES)
            way.setblocking(False)
            self._there.setblocking(False)
            self._handing = _Handing(way, self._on_lost)
            stack.callback(self._handing.close)
            self._table = RemoteTable(config.cid, loop, self, self._fates, broken)
            self.host = VsockHost(self._table, loop, guest_log, self._on_serve)
            stack.push_async_callback(self.host.close)
            if self._uds is not None:
                programs = UnixSocket(self._uds, self._on_program, guest_log, loop)
                stack.callback(programs.close)
            self._theirs = opened.pop_all()

    def theirs(self, stack: contextlib.ExitStack) -> list[int]:
        """For the worker's setup; `stack` closes them."""
        stack.push(self._theirs)
        return [self._there.fileno(), self._fates.fd]

    def hear(self, record: say.OfSockets) -> None:
        """What the worker says. Raises HostError("worker-protocol")."""
        match record:
            case say.Requested():
                self._on_request(record)
            case say.Took():
                self._handing.on_took()
            case say.Declined():
                failure = record.failure
                error = None if failure is None else say.error_of(failure)
                self._table.decline(record.fate, error)

    def hold(self) -> None:
        """The guest is being paused."""
        self._table.hold()

    def resume(self) -> None:
        """It goes on."""
        self._table.resume()

    # --- for the table

    def ask(self, fate: int, port: int, theirs: socket.socket) -> None:
        """See Worker, here and below."""
        self._hand(say.Ask(fate, port), theirs)

    def accept(self, number: int, fate: int, theirs: socket.socket) -> None:
        self._hand(say.Accept(number, fate), theirs)

    def forget(self, fate: int) -> bool:
        record = self._handing.take_back(fate)
        if isinstance(record, say.Accept):
            self._line.say(say.Refuse(record.number))
        return record is not None

    # --- inside

    def _hand(self, record: say.Handed, theirs: socket.socket) -> None:
        try:
            self._handing.hand(record, theirs)
        except HostError as e:
            self._on_lost(record, e)

    def _on_lost(self, record: say.Handed, error: HostError) -> None:
        loop = asyncio.get_running_loop()
        if isinstance(record, say.Accept):
            self._line.say(say.Refuse(record.number))
            if record.fate is not None:  # in a turn of its own: it is not open yet
                loop.call_soon(self._table.decline, record.fate, error)
        elif record.fate is not None:
            self._table.decline(record.fate, error)

    def _on_serve(self, port: int, serving: bool) -> None:
        (self._served.add if serving else self._served.discard)(port)

    def _on_request(self, record: say.Requested) -> None:
        if self._line.waiting_bytes > _REFUSED_BEHIND_BYTES:
            raise HostError("worker-protocol", op="Requests without an ear for answers")
        try:
            if record.host_port in self._served:
                taken = self._table.request(record.number, record.host_port, record.guest_port)
            else:
                taken = self._uds is not None and self._join(record, self._uds)
        except HostError as e:
            self._guest_log.write(log, logging.WARNING, "vsock: %s", e)
            taken = False
        if not taken:
            self._line.say(say.Refuse(record.number))

    def _join(self, record: say.Requested, uds: str) -> bool:
        """To the unix socket of that port, if a program listens there."""
        try:
            program = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as e:
            raise HostError("descriptors", op="socket", errno=e.errno) from e
        try:
            # A unix socket is connected at once, or nobody listens or has time.
            program.connect(f"{uds}_{record.host_port}")
        except OSError:
            program.close()
            return False
        self._handing.hand(say.Accept(record.number, None), program)
        return True

    def _on_program(self, program: socket.socket, port: int) -> None:
        """One that wants a port of the guest's."""
        self._handing.hand(say.Ask(None, port), program)
