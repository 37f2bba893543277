"""The messages on the control queues of a device with ports (virtio 1.3 section 5.3.6.2)."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

_HEADER = struct.Struct("<IHH")  # id, event, value


class Event(enum.IntEnum):
    """What a message says."""

    DEVICE_READY = 0
    DEVICE_ADD = 1
    DEVICE_REMOVE = 2
    PORT_READY = 3
    CONSOLE_PORT = 4
    RESIZE = 5
    PORT_OPEN = 6
    PORT_NAME = 7


@dataclass(frozen=True, slots=True)
class Message:
    """id: of the port; means nothing for DEVICE_READY."""

    id: int
    event: Event
    value: int


FROM_DRIVER = (Event.DEVICE_READY, Event.PORT_READY, Event.PORT_OPEN)


def parse(data: bytes) -> Message | None:
    """A driver's message; None when it is none, or one that only a device sends."""
    if len(data) < _HEADER.size:
        return None
    id, event, value = _HEADER.unpack_from(data)
    return Message(id, Event(event), value) if event in FROM_DRIVER else None


def pack(id: int, event: Event, value: int, rest: bytes = b"") -> bytes:
    """A device's message. rest: the name after PORT_NAME."""
    return _HEADER.pack(id, event, value) + rest
