"""Why streams end with an error: what a program is told, wherever the device is."""

from __future__ import annotations

import enum
import errno
from typing import Final

from avmm.native import lib


class Reason(enum.IntEnum):
    """enum av_vsock_reason in native/vsock.h."""

    MICROVM_ENDED = lib.AV_VSOCK_NOT_SAID
    GUEST_RESET = lib.AV_VSOCK_GUEST_RESET
    DRIVER_RESET = lib.AV_VSOCK_DRIVER_RESET
    DEVICE_BROKEN = lib.AV_VSOCK_DEVICE_BROKEN
    OPERATION = lib.AV_VSOCK_BAD_OPERATION
    DATA = lib.AV_VSOCK_BAD_DATA
    SHUTDOWN = lib.AV_VSOCK_BAD_SHUTDOWN
    UNSENT = lib.AV_VSOCK_UNSENT
    NO_ROOM = lib.AV_VSOCK_NO_ROOM
    LATE = lib.AV_VSOCK_LATE
    UNREAD = lib.AV_VSOCK_UNREAD
    NO_MEMORY = lib.AV_VSOCK_NO_MEMORY


_TEXTS: Final = {
    Reason.MICROVM_ENDED: "The microVM has ended",
    Reason.GUEST_RESET: "The guest reset the connection",
    Reason.DRIVER_RESET: "The guest's vsock driver was reset",
    Reason.DEVICE_BROKEN: "The guest broke its vsock device",
    Reason.OPERATION: "The guest broke the connection: an operation out of place",
    Reason.DATA: "The guest broke the connection: data out of place",
    Reason.SHUTDOWN: "The guest broke the connection: shutdown out of place",
    Reason.UNSENT: "The guest broke the connection: it has read more than it was sent",
    Reason.NO_ROOM: "The guest broke the connection: it sends more than there is room for",
    Reason.LATE: "The guest does not close the connection, or takes nothing more of it",
    Reason.UNREAD: "The guest has closed too many connections that nobody has read to the end",
    Reason.NO_MEMORY: "There is no memory for what the guest sends",
}


def reset_error(reason: Reason) -> ConnectionResetError:
    """For a connection that is no more."""
    return ConnectionResetError(errno.ECONNRESET, _TEXTS[reason])


def refusal(guest_port: int) -> ConnectionRefusedError:
    """For one that the guest does not want."""
    return ConnectionRefusedError(
        errno.ECONNREFUSED, f"The guest refused at vsock port {guest_port}"
    )
