"""What `avmm attach` and a microVM say to each other over a console's socket.

A frame is its type, one byte; the length of what follows, four bytes, little-endian; and that.
The microVM begins with HELLO. A client that knows only DATA already has a console.
"""

from __future__ import annotations

import asyncio
import enum
import struct

from avmm.errors import HostError
from avmm.units import KIB

VERSION = b"avmm console 1"
PAYLOAD_MAX_BYTES = 64 * KIB
LOST = struct.Struct("<Q")
SIZE = struct.Struct("<HH")
_HEADER = struct.Struct("<BI")


class Kind(enum.IntEnum):
    """HELLO: VERSION. DATA: bytes of the console, both ways. LOST: how many bytes the client was
    too slow to be told. END: the guest has ended, and why. SIZE: the client's columns and rows."""

    HELLO = 1
    DATA = 2
    LOST = 3
    END = 4
    SIZE = 5


def frame(kind: Kind, payload: bytes = b"") -> bytes:
    """The bytes of a frame. payload: at most PAYLOAD_MAX_BYTES."""
    return _HEADER.pack(kind, len(payload)) + payload


async def read_frame(reader: asyncio.StreamReader) -> tuple[int, bytes] | None:
    """The next frame, of any kind; None at the end, also in the middle of a frame.

    Raises HostError("console-protocol") for one that is too long.
    """
    try:
        kind, size = _HEADER.unpack(await reader.readexactly(_HEADER.size))
        if size > PAYLOAD_MAX_BYTES:
            raise HostError(
                "console-protocol",
                op="Console socket",
                remedy=f"a frame of {size} bytes is longer than {PAYLOAD_MAX_BYTES}",
            )
        return kind, await reader.readexactly(size)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
