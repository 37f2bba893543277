"""One way to make an ioctl: a failure always names the call."""

from __future__ import annotations

import fcntl

from avmm.errors import HostError
from avmm.native import lib


def ioctl(fd: int, op: str, request: int, argument: int | bytearray | bytes = 0) -> int:
    """The ioctl's result. A bytearray is filled in place; blocks only as long as the kernel does.

    op: the call's name for the HostError("ioctl") that a refusal raises.
    """
    if isinstance(argument, int):
        result = lib.av_ioctl_value(fd, request, argument)
        if result < 0:
            raise HostError("ioctl", op=op, errno=-result)
        return result
    data = bytearray(argument) if isinstance(argument, bytes) else argument
    try:
        return int(fcntl.ioctl(fd, request, data, True))
    except OSError as e:
        raise HostError("ioctl", op=op, errno=e.errno) from e
