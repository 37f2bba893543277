"""Event descriptors with an owner."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack


def owned_eventfd(stack: AsyncExitStack) -> int:
    """A non-blocking eventfd that `stack` closes."""
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    stack.callback(os.close, fd)
    return fd
