"""How the files of a microVM are opened: by their paths, or handed in where there are none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TypeAlias

Opener: TypeAlias = Callable[[str, int], int]
"""Takes a path and os.open()'s flags, gives a descriptor for the caller to close, or OSError."""


def open_path(path: str, flags: int) -> int:
    """Of the host's file system."""
    return os.open(path, flags | os.O_CLOEXEC)


@contextlib.contextmanager
def closing_fd(fd: int) -> Iterator[int]:
    """Close it afterwards."""
    try:
        yield fd
    finally:
        os.close(fd)
