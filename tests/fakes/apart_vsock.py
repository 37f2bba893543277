"""A vsock whose host is on the other side of what a program and its worker say to each other, here
in one process: `apart_rig` in the place of virtio_rig."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec

from avmm.errors import AvmmError
from avmm.log import GuestLog
from avmm.machine.isolation import messages as say
from avmm.machine.isolation.relay import SocketRelay
from avmm.machine.isolation.sockets import Sockets
from avmm.virtio.devices.vsock import Vsock
from fakes.virtio_rig import virtio_rig

apart_rig = asynccontextmanager(virtio_rig.__wrapped__)  # type: ignore[attr-defined]
"""Another object that does the same, for vsock_guest() to know."""


@dataclass
class Line:
    """One end of say.Line: what is said is heard at the other end, in turns of its own."""

    hear: Any = None
    waiting_bytes: int = 0
    said: list[say.Record] = field(default_factory=list)

    def say(self, record: say.Record) -> None:
        data = msgspec.msgpack.encode(record)
        self.said.append(record)
        again = msgspec.msgpack.decode(data, type=say.News | say.Command)
        asyncio.get_running_loop().call_soon(self.hear, again)


@dataclass
class Apart:
    """broken: what the program was told of its worker."""

    sockets: Sockets
    relay: SocketRelay
    to_program: Line
    to_worker: Line
    broken: list[AvmmError]


@asynccontextmanager
async def apart(device: Any, config: Vsock) -> AsyncIterator[Apart]:
    """The host of this device."""
    broken: list[AvmmError] = []
    to_worker, to_program = Line(), Line()

    def hear(record: Any) -> None:
        try:
            sockets.hear(record)
        except AvmmError as e:
            broken.append(e)

    async with AsyncExitStack() as stack:
        sockets = Sockets(config, to_worker, GuestLog(), broken.append, stack)  # type: ignore[arg-type]
        with ExitStack() as theirs:
            way, fates = (os.dup(fd) for fd in sockets.theirs(theirs))
        relay = SocketRelay(device, to_program, way, fates)  # type: ignore[arg-type]
        to_worker.hear, to_program.hear = relay.refuse, hear
        try:
            yield Apart(sockets, relay, to_program, to_worker, broken)
        finally:
            relay.close()
