"""The worker's side of its guest's vsock: sockets come from the program and go to the lane."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from typing import Final

import msgspec

from avmm.errors import HostError
from avmm.loop import add_reader
from avmm.machine.isolation import messages as say
from avmm.virtio.devices.vsock import VsockDevice
from avmm.vsock.connection import Connection, State
from avmm.vsock.fates import FATES, LaneFates
from avmm.vsock.table import too_many

_ASKING_MAX: Final = 256
"""Requests of the guest's that the program has not answered."""
_SPLICED_MAX: Final = 2 * FATES
"""Those of the program's own, and as many of unix sockets."""
_TAKEN_A_TURN: Final = 16


class SocketRelay:
    """Loop. From before the first guest instruction to close(). Owns all that comes by `way`.

    way, fates: descriptors, which are taken over.
    """

    def __init__(self, device: VsockDevice, line: say.Line, way: int, fates: int) -> None:
        self._device = device
        self._line = line
        self._way = socket.socket(fileno=way)
        self._way.setblocking(False)
        self._fates = LaneFates(fates)
        self._loop = asyncio.get_running_loop()
        self._decoder = msgspec.msgpack.Decoder(say.Handed)
        self._asking: dict[int, Connection] = {}
        self._numbers = itertools.count()
        device.table.answer_by(self._on_request)
        add_reader(self._loop, self._way.fileno(), self._on_handed)

    def close(self) -> None:
        """Take no more."""
        self._loop.remove_reader(self._way.fileno())
        self._way.close()
        self._asking.clear()

    def refuse(self, record: say.Refuse) -> None:
        """The program does not want it."""
        self._refuse(self._asking.pop(record.number, None))

    def _on_request(self, connection: Connection) -> bool:
        if len(self._asking) >= _ASKING_MAX:
            return False
        number = next(self._numbers)
        self._asking[number] = connection
        self._line.say(say.Requested(number, connection.host_port, connection.guest_port))
        return True

    def _refuse(self, connection: Connection | None) -> None:
        if connection is not None and connection.state is State.ASKING:
            self._device.table.counters.refused += 1
            connection.reset()

    def _on_handed(self) -> None:
        for _ in range(_TAKEN_A_TURN):
            try:
                data, fds, _, _ = socket.recv_fds(self._way, say.HANDED_MAX_BYTES, 1)
            except BlockingIOError:
                return
            if not data:  # the program is gone, as the line will say
                self._loop.remove_reader(self._way.fileno())
                return
            self._line.say(say.Took())
            record = self._decoder.decode(data)
            fd = fds[0] if fds else -1
            match record:
                case say.Ask():
                    self._ask(record, fd)
                case say.Accept():
                    self._accept(record, fd)

    def _ask(self, record: say.Ask, fd: int) -> None:
        try:
            self._check_room(fd)
            self._device.splice.ask(fd, record.port, self._fates.at(record.fate))
        except HostError as e:
            self._decline(record.fate, e)

    def _accept(self, record: say.Accept, fd: int) -> None:
        connection = self._asking.pop(record.number, None)
        try:
            self._check_room(fd)
        except HostError as e:
            self._refuse(connection)
            self._decline(record.fate, e)
            return
        if connection is None or connection.state is not State.ASKING:
            os.close(fd)
            self._decline(record.fate, None)
        elif self._device.splice.accept(fd, connection, self._fates.at(record.fate)):
            self._device.table.hand_over(connection)
        else:
            self._refuse(connection)
            self._decline(record.fate, None)

    def _check_room(self, fd: int) -> None:
        """Raises HostError("descriptors" | "vsock"), and then the socket is closed."""
        if fd < 0:
            raise HostError("descriptors", op="Taking a socket")
        if self._device.splice.statistics().connections > _SPLICED_MAX:
            os.close(fd)
            raise too_many(_SPLICED_MAX)

    def _decline(self, fate: int | None, error: HostError | None) -> None:
        if fate is not None:
            failure = None if error is None else say.failure_of(error)
            self._line.say(say.Declined(fate, failure))
