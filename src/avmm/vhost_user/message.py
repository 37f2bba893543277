"""vhost-user messages: from bytes to checked values and back. Knows no sockets.

The text is QEMU's docs/interop/vhost-user, which its front-ends and everybody else's follow.
What the front-end sends is hostile input: a message that is not what the text says is a
GuestFault("front-end"), and ends its connection.
"""

from __future__ import annotations

import enum
import functools
import struct
from collections.abc import Callable
from dataclasses import dataclass

from avmm.errors import GuestFault

F_PROTOCOL_FEATURES = 1 << 30
"""Among the virtio features: the back-end knows GET_ and SET_PROTOCOL_FEATURES."""

REGIONS_MAX = 8
QUEUE_SIZE_MAX = 1024
CONFIG_BYTES_MAX = 256
PAYLOAD_BYTES_MAX = 12 + CONFIG_BYTES_MAX
"""Of every message of ours: the longest is one with a configuration space."""

FDS_MAX = REGIONS_MAX


class ProtocolFeature(enum.IntFlag):
    """Those that we offer."""

    MQ = 1 << 0
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13


class Request(enum.IntEnum):
    """Those that we serve."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    RESET_DEVICE = 34


ANSWERED = frozenset(
    {
        Request.GET_FEATURES,
        Request.GET_VRING_BASE,
        Request.GET_PROTOCOL_FEATURES,
        Request.GET_QUEUE_NUM,
        Request.GET_CONFIG,
        Request.GET_INFLIGHT_FD,
    }
)
"""Requests with a reply of their own; the others have one only by NEED_REPLY."""

_VERSION = 1
_VERSION_MASK = 0x3
_REPLY = 1 << 2
_NEED_REPLY = 1 << 3
_FLAGS = _VERSION_MASK | _REPLY | _NEED_REPLY
_CONFIG_CHANGE = 2
_NO_FD = 1 << 8
_VRING_FILE = 0xFF | _NO_FD

_HEADER = struct.Struct("<III")
_U64 = struct.Struct("<Q")
_VRING_STATE = struct.Struct("<II")
_VRING_ADDRESSES = struct.Struct("<IIQQQQ")
_TABLE_HEAD = struct.Struct("<I4x")
_REGION = struct.Struct("<QQQQ")
_CONFIG_HEAD = struct.Struct("<III")
_INFLIGHT = struct.Struct("<QQHH")
_INFLIGHT_PADDED_BYTES = 24
"""Some front-ends, QEMU among them, send their compiler's padding, and expect it."""

HEADER_BYTES = _HEADER.size


@dataclass(frozen=True, slots=True)
class Header:
    """request: a number, known or not. size_bytes: of the payload that follows."""

    request: int
    need_reply: bool
    size_bytes: int

    @property
    def name(self) -> str:
        """For messages to people."""
        try:
            return Request(self.request).name
        except ValueError:
            return f"request {self.request}"


@dataclass(frozen=True, slots=True)
class U64:
    """Features, and answers."""

    value: int


@dataclass(frozen=True, slots=True)
class VringState:
    """index: of a ring. value: its size, its base, or whether it is enabled."""

    index: int
    value: int


@dataclass(frozen=True, slots=True)
class VringAddresses:
    """Where a ring is, in the front-end's address space."""

    index: int
    desc_uva: int
    driver_uva: int
    device_uva: int


@dataclass(frozen=True, slots=True)
class VringFile:
    """index: of a ring. has_fd: whether a descriptor came with the message."""

    index: int
    has_fd: bool


@dataclass(frozen=True, slots=True)
class TableRegion:
    """A piece of guest memory: in the guest's, in the front-end's address space, in its file."""

    gpa: int
    size_bytes: int
    uva: int
    offset_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryTable:
    """One descriptor came with the message for each region, in their order."""

    regions: tuple[TableRegion, ...]


@dataclass(frozen=True, slots=True)
class ConfigAccess:
    """A piece of the configuration space; data: to write, or as much room to read into."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class InflightMemory:
    """Where what is in flight is kept; size_bytes: from offset_bytes on, in the file that comes
    along. payload_bytes: of the message, whose answer is as long."""

    size_bytes: int
    offset_bytes: int
    queues: int
    queue_size: int
    payload_bytes: int


Payload = (
    None
    | U64
    | VringState
    | VringAddresses
    | VringFile
    | MemoryTable
    | ConfigAccess
    | InflightMemory
)


@dataclass(frozen=True, slots=True)
class Message:
    """A request with its payload taken apart."""

    request: Request
    need_reply: bool
    payload: Payload


def parse_header(data: bytes) -> Header:
    """Of HEADER_BYTES bytes. Raises GuestFault("front-end"), also for a payload too long."""
    request, flags, size_bytes = _HEADER.unpack(data)
    header = Header(request, bool(flags & _NEED_REPLY), size_bytes)
    if flags & _VERSION_MASK != _VERSION or flags & ~_FLAGS:
        raise _fault(f"{header.name}: flags {flags:#x}; this is version {_VERSION} of the protocol")
    if flags & _REPLY:
        raise _fault(f"{header.name}: it is marked as a reply, and nothing was asked")
    if size_bytes > PAYLOAD_BYTES_MAX:
        raise _fault(f"{header.name}: {size_bytes} bytes of payload")
    return header


def parse(header: Header, payload: bytes, fds: int) -> Message | None:
    """The message of a header, its payload and the number of descriptors that came along.

    None for a request that we do not know. Raises GuestFault("front-end").
    """
    try:
        request = Request(header.request)
    except ValueError:
        return None
    parser = _PARSERS.get(request, _nothing)
    try:
        return Message(request, header.need_reply, parser(payload, fds))
    except struct.error as e:
        raise _fault(f"{request.name}: {len(payload)} bytes of payload") from e
    except GuestFault as e:
        raise _fault(f"{request.name}: {e}") from None


def reply(request: int, payload: bytes) -> bytes:
    """The bytes of an answer."""
    return _HEADER.pack(request, _VERSION | _REPLY, len(payload)) + payload


def config_change() -> bytes:
    """The bytes of our only request to the front-end: to read the configuration space again."""
    return _HEADER.pack(_CONFIG_CHANGE, _VERSION, 0)


def u64(value: int) -> bytes:
    """The payload of an answer with one number."""
    return _U64.pack(value)


def vring_state(index: int, value: int) -> bytes:
    """The payload of GET_VRING_BASE's answer."""
    return _VRING_STATE.pack(index, value)


def config(access: ConfigAccess, data: bytes) -> bytes:
    """The payload of GET_CONFIG's answer."""
    return _CONFIG_HEAD.pack(access.offset, len(data), 0) + data


def inflight(memory: InflightMemory) -> bytes:
    """The payload of GET_INFLIGHT_FD's answer."""
    fields = (memory.size_bytes, memory.offset_bytes, memory.queues, memory.queue_size)
    return _INFLIGHT.pack(*fields).ljust(memory.payload_bytes, b"\0")


def _fault(message: str) -> GuestFault:
    return GuestFault("front-end", message)


def _expect_fds(fds: int, expected: int) -> None:
    if fds != expected:
        raise _fault(f"{fds} descriptors came with it, not {expected}")


def _nothing(payload: bytes, fds: int, expected_fds: int = 0) -> None:
    _expect_fds(fds, expected_fds)
    # Some front-ends send a number that means nothing with requests that have no payload.
    if len(payload) not in (0, _U64.size):
        raise _fault(f"{len(payload)} bytes of payload")


def _u64(payload: bytes, fds: int) -> U64:
    _expect_fds(fds, 0)
    return U64(*_U64.unpack(payload))


def _vring_state(payload: bytes, fds: int) -> VringState:
    _expect_fds(fds, 0)
    return VringState(*_VRING_STATE.unpack(payload))


def _vring_addresses(payload: bytes, fds: int) -> VringAddresses:
    _expect_fds(fds, 0)
    index, flags, desc, device, driver, _log = _VRING_ADDRESSES.unpack(payload)
    if flags:
        raise _fault(f"flags {flags:#x}; a log of writes is not offered")
    return VringAddresses(index, desc, driver, device)


def _vring_file(payload: bytes, fds: int) -> VringFile:
    (value,) = _U64.unpack(payload)
    if value & ~_VRING_FILE:
        raise _fault(f"{value:#x} is no ring's index")
    _expect_fds(fds, 0 if value & _NO_FD else 1)
    return VringFile(value & 0xFF, not value & _NO_FD)


def _memory_table(payload: bytes, fds: int) -> MemoryTable:
    (count,) = _TABLE_HEAD.unpack_from(payload)
    if not 1 <= count <= REGIONS_MAX:
        raise _fault(f"{count} regions, not 1 to {REGIONS_MAX}")
    _expect_fds(fds, count)
    # Some front-ends always send the whole array.
    table = payload[_TABLE_HEAD.size :]
    if len(table) not in (count * _REGION.size, REGIONS_MAX * _REGION.size):
        raise _fault(f"{len(payload)} bytes of payload for {count} regions")
    regions = list(_REGION.iter_unpack(table))[:count]
    return MemoryTable(tuple(TableRegion(*region) for region in regions))


def _config(payload: bytes, fds: int) -> ConfigAccess:
    _expect_fds(fds, 0)
    offset, size_bytes, _flags = _CONFIG_HEAD.unpack_from(payload)
    data = payload[_CONFIG_HEAD.size :]
    if size_bytes != len(data):
        raise _fault(f"{size_bytes} bytes are announced, and {len(data)} came")
    if not 0 < size_bytes <= CONFIG_BYTES_MAX or offset > CONFIG_BYTES_MAX - size_bytes:
        raise _fault(f"{size_bytes} bytes at {offset} are outside of a configuration space")
    return ConfigAccess(offset, data)


def _inflight(payload: bytes, fds: int, expected_fds: int) -> InflightMemory:
    _expect_fds(fds, expected_fds)
    if len(payload) not in (_INFLIGHT.size, _INFLIGHT_PADDED_BYTES):
        raise _fault(f"{len(payload)} bytes of payload")
    size_bytes, offset_bytes, queues, queue_size = _INFLIGHT.unpack_from(payload)
    memory = InflightMemory(size_bytes, offset_bytes, queues, queue_size, len(payload))
    if memory.queues == 0 or not 0 < memory.queue_size <= QUEUE_SIZE_MAX:
        raise _fault(f"{memory.queues} queues of {memory.queue_size}")
    return memory


_PARSERS: dict[Request, Callable[[bytes, int], Payload]] = {
    Request.SET_FEATURES: _u64,
    Request.SET_MEM_TABLE: _memory_table,
    Request.SET_VRING_NUM: _vring_state,
    Request.SET_VRING_ADDR: _vring_addresses,
    Request.SET_VRING_BASE: _vring_state,
    Request.GET_VRING_BASE: _vring_state,
    Request.SET_VRING_KICK: _vring_file,
    Request.SET_VRING_CALL: _vring_file,
    Request.SET_VRING_ERR: _vring_file,
    Request.SET_PROTOCOL_FEATURES: _u64,
    Request.SET_VRING_ENABLE: _vring_state,
    Request.SET_BACKEND_REQ_FD: functools.partial(_nothing, expected_fds=1),
    Request.GET_CONFIG: _config,
    Request.SET_CONFIG: _config,
    Request.GET_INFLIGHT_FD: functools.partial(_inflight, expected_fds=0),
    Request.SET_INFLIGHT_FD: functools.partial(_inflight, expected_fds=1),
}
