"""Event descriptors."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack

from avmm.errors import HostError


def new_eventfd() -> int:
    """A non-blocking eventfd for the caller to close. Raises HostError("descriptors")."""
    try:
        return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    except OSError as e:
        raise HostError("descriptors", op="eventfd", errno=e.errno) from e


def owned_eventfd(stack: AsyncExitStack) -> int:
    """One that `stack` closes."""
    fd = new_eventfd()
    stack.callback(os.close, fd)
    return fd
