"""Packets of the socket device (virtio 1.3 section 5.10.6), parsed and made. Knows no sockets."""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

HEADER: Final = struct.Struct("<QQIIIHHIII")
HEADER_BYTES: Final = HEADER.size
TYPE_STREAM: Final = 1

CID_HOST: Final = 2
CID_MIN, CID_MAX = 3, 0xFFFF_FFFE
"""Of a guest; the others mean something else (5.10.4)."""
PORT_MAX: Final = 0xFFFF_FFFE
"""The highest port is "any" to a guest's programs."""


class Op(enum.IntEnum):
    """What a packet is for."""

    INVALID = 0
    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


SHUTDOWN_RECEIVE: Final = 1
SHUTDOWN_SEND: Final = 2
SHUTDOWN_BOTH: Final = 3


class Header(NamedTuple):
    """struct virtio_vsock_hdr. op, type: whatever the sender wrote. size_bytes: of the payload."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    size_bytes: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int

    def pack(self) -> bytes:
        """As it stands in memory."""
        return HEADER.pack(*self)


def parse(headers: bytes | memoryview) -> Iterator[Header]:
    """Headers that lie one after the other."""
    return map(Header._make, HEADER.iter_unpack(headers))


def reset_for(header: Header) -> Header:
    """The answer to a packet that has no connection, or is none that can be understood."""
    return Header(
        header.dst_cid,
        header.src_cid,
        header.dst_port,
        header.src_port,
        0,
        header.type,
        Op.RST,
        0,
        0,
        0,
    )
