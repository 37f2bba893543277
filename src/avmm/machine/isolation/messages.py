"""What a program and its worker say to each other: MessagePack records on a stream socket.

Neither believes the other's bytes: a record is decoded by its declared types, and is of bounded
size. What a worker says concerns its own microVM alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Annotated, Any, Final, TypeVar

import msgspec

from avmm.errors import AvmmError, BugError, ConfigError, GuestFault, HostError, SnapshotError
from avmm.log import LINE_MAX, printable
from avmm.machine.reason import ExitKind, ExitReason
from avmm.machine.statistics import MachineStatistics
from avmm.virtio.limit import RateLimit
from avmm.vsock.fates import FATES

T = TypeVar("T")

RECORD_MAX_BYTES = 4 << 20
"""A machine with every device and queue there can be says less in its statistics."""

LENGTH_BYTES = 4
_RECORDS_A_TURN: Final = 16

Port = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFF)]
Fate = Annotated[int, msgspec.Meta(ge=0, lt=FATES)]
Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Text = Annotated[str, msgspec.Meta(max_length=LINE_MAX)]
"""Of an event, of which many may wait for a reader."""
Errno = Annotated[int, msgspec.Meta(ge=0, lt=4096)]
Level = Annotated[int, msgspec.Meta(ge=0, le=logging.CRITICAL)]
"""A logger remembers each that it was ever asked about."""


class Record(msgspec.Struct, frozen=True, tag=True, array_like=True, forbid_unknown_fields=True):
    """Base of all."""


# What the program says.


class HandedTap(Record, frozen=True):
    """An open TAP: its name, how many descriptors it has, and what the kernel says of it."""

    name: str
    queues: int
    mtu: int
    uso: bool


class Setup(Record, frozen=True):
    """The first, with descriptors: of `files`, which are (path, flags) in their order, of the TAPs'
    queues, of the consoles' pipes, then, with a vsock, of the socket by which sockets come and of
    the memory of fates. uid: user and group to become, None: it stays what it is.
    locked_bytes: of memory that may be. log_level: of what is told."""

    config: dict[str, Any]
    files: list[tuple[str, int]]
    taps: list[HandedTap]
    consoles: list[str]
    vsock: bool
    uid: int | None
    locked_bytes: int
    log_level: int


class Pause(Record, frozen=True):
    """MicroVM.pause(); answered by Done, as Resume is."""


class Resume(Record, frozen=True):
    """MicroVM.resume()."""


class Stop(Record, frozen=True):
    """End now."""


class PressPower(Record, frozen=True):
    """Press the power button."""


class Limit(Record, frozen=True):
    """MicroVM.set_disk_limit()."""

    id: str
    limit: RateLimit | None


class SetLink(Record, frozen=True):
    """MicroVM.set_link()."""

    id: str
    up: bool


class LimitNic(Record, frozen=True):
    """MicroVM.set_nic_limits()."""

    id: str
    rx: RateLimit | None
    tx: RateLimit | None


class Input(Record, frozen=True):
    """Bytes for the guest, answered by Taken; one at a time for each console."""

    console: str
    number: int
    data: bytes


class Resize(Record, frozen=True):
    """Console.resize()."""

    console: str
    columns: int
    rows: int


class Refuse(Record, frozen=True):
    """Nobody is there for that Requested."""

    number: Number


class Probe(Record, frozen=True):
    """For tests of the walls: a worker that was not started for that takes it for nonsense."""

    code: str


Changes = Limit | SetLink | LimitNic
Command = Pause | Resume | Stop | PressPower | Changes | Input | Resize | Refuse | Probe


# What the program says with a socket, in a message of its own by the other way; answered by Took.


class Ask(Record, frozen=True):
    """Ask the guest to accept the program of that socket. fate: None: of nobody's interest."""

    fate: Fate | None
    port: Port


class Accept(Record, frozen=True):
    """The program of that socket accepts that Requested."""

    number: Number
    fate: Fate | None


Handed = Ask | Accept
HANDED_MAX_BYTES = 64


# What the worker says.


class Failure(Record, frozen=True):
    """An error of ours, as values."""

    family: str
    kind: str
    message: str
    op: str = ""
    errno: Errno | None = None
    path: str | None = None
    remedy: str | None = None


class Running(Record, frozen=True):
    """The guest runs. landlock: the ABI in use, 0: none."""

    landlock: int
    statistics: MachineStatistics


class Failed(Record, frozen=True):
    """It did not come to that."""

    failure: Failure


class Done(Record, frozen=True):
    """The answer to the oldest Pause or Resume without one."""

    failure: Failure | None
    statistics: MachineStatistics | None


class Report(Record, frozen=True):
    """The counters, now and then."""

    statistics: MachineStatistics


class Ready(Record, frozen=True):
    """A driver has set its device up, or left it."""

    device: Text
    ready: bool


class Fault(Record, frozen=True):
    """The guest broke the specification of a device."""

    device: Text
    kind: Text
    detail: Text


class Link(Record, frozen=True):
    """A cable was plugged in or out."""

    device: Text
    up: bool


class Taken(Record, frozen=True):
    """The guest has that Input."""

    console: str
    number: int


class Requested(Record, frozen=True):
    """The guest asks for a port of the host's; answered by Accept or Refuse."""

    number: Number
    host_port: Port
    guest_port: Port


class Took(Record, frozen=True):
    """The oldest socket that was on its way has come."""


class Declined(Record, frozen=True):
    """And nothing comes of it. failure: None: the guest does not ask any more."""

    fate: Fate
    failure: Failure | None


class Log(Record, frozen=True):
    """A line of the log."""

    logger: str
    level: Level
    text: str


class Ended(Record, frozen=True):
    """The guest has ended; what its consoles have left follows in their pipes."""

    kind: ExitKind
    detail: str
    statistics: MachineStatistics

    def reason(self) -> ExitReason:
        """As the microVM's."""
        return ExitReason(self.kind, printable(self.detail))


class Probed(Record, frozen=True):
    """What came of a Probe."""

    result: str


OfSockets = Requested | Took | Declined
News = (
    Running
    | Failed
    | Done
    | Report
    | Ready
    | Fault
    | Link
    | Taken
    | OfSockets
    | Log
    | Ended
    | Probed
)


_FAMILIES: dict[str, type[AvmmError]] = {
    family.__name__: family for family in (ConfigError, GuestFault, SnapshotError, BugError)
}


def failure_of(error: BaseException) -> Failure:
    """An error as values; one that is not of our families is a bug of ours."""
    if isinstance(error, HostError):
        return Failure(
            "HostError",
            error.kind,
            str(error),
            error.op,
            error.errno,
            error.path,
            error.remedy,
        )
    if isinstance(error, AvmmError):
        return Failure(type(error).__name__, error.kind, str(error))
    return Failure("BugError", "worker", f"{type(error).__name__}: {error}")


def error_of(failure: Failure) -> AvmmError:
    """The error again."""
    if failure.family == "HostError":
        return HostError(
            failure.kind,
            op=printable(failure.op),
            errno=failure.errno,
            path=failure.path and printable(failure.path),
            remedy=failure.remedy and printable(failure.remedy),
        )
    return _FAMILIES.get(failure.family, BugError)(failure.kind, printable(failure.message))


def packed(record: Record) -> bytes:
    """As it goes over the socket."""
    data = msgspec.msgpack.encode(record)
    return len(data).to_bytes(LENGTH_BYTES, "little") + data


class Line:
    """One end of the socket. Loop. what: the records that come."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, what: Any):
        self._reader = reader
        self._writer = writer
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(what)
        self._came = 0

    def say(self, record: Record) -> None:
        """Send it, in order; nothing once the other side is gone."""
        if not self._writer.is_closing():
            self._writer.write(packed(record))

    @property
    def waiting_bytes(self) -> int:
        """What was said and not sent so far."""
        return self._writer.transport.get_write_buffer_size()

    async def sent(self) -> None:
        """Wait until there is room again."""
        await self._writer.drain()

    async def next(self) -> Any:
        """The next record; None at the end. Raises HostError("worker-protocol")."""
        self._came += 1
        if self._came % _RECORDS_A_TURN == 0:
            await asyncio.sleep(0)  # what has come already is read without one turn of the loop
        try:
            length = int.from_bytes(await self._reader.readexactly(LENGTH_BYTES), "little")
            if length > RECORD_MAX_BYTES:
                raise HostError("worker-protocol", op=f"A record of {length} bytes")
            return self._decoder.decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        except (msgspec.DecodeError, AvmmError) as e:
            raise HostError("worker-protocol", op="A record of another kind", remedy=str(e)) from e

    async def closed(self) -> None:
        """Say no more, and wait until the socket is closed. Idempotent."""
        self._writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
