"""A host that refuses the n-th call of a kind: failing_host.c, preloaded, and its control."""

from __future__ import annotations

import ctypes
import enum
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_SOURCE = Path(__file__).with_suffix(".c")
_LAST = 2**62


class Calls(enum.IntFlag):
    """Kinds of calls, as failing_host.c counts them."""

    DESCRIPTOR = 1 << 0
    MEMORY = 1 << 1
    THREAD = 1 << 2
    IOCTL = 1 << 3
    WATCH = 1 << 4
    LOCK = 1 << 5
    RUN = 1 << 6
    READ = 1 << 7
    WRITE = 1 << 8
    SYNC = 1 << 9
    ALLOCATE = 1 << 10
    SEND = 1 << 11
    RECEIVE = 1 << 12


SHORT = 0x10000
"""In place of an error: the transfer is done in part."""


def build(folder: Path) -> Path:
    """Compile it to a library in `folder`."""
    library = folder / "failing_host.so"
    options = ("-shared", "-fPIC", "-fvisibility=hidden", "-O1", "-Wall", "-Wextra", "-Werror")
    subprocess.run(["gcc", *options, "-o", str(library), str(_SOURCE)], check=True)
    return library


def environment(library: Path) -> dict[str, str]:
    """For a program of tests/fakes that is to run on such a host."""
    path = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
    return os.environ | path | {"LD_PRELOAD": str(library)}


@dataclass
class Refusals:
    """seen: calls of the kind; failed: those that were refused. As of the end of the block."""

    seen: int = 0
    failed: int = 0


@contextmanager
def refusing(calls: Calls, at: int, errno: int, *, lasting: bool = False) -> Iterator[Refusals]:
    """Inside, call number `at` of these fails, from 1 on; with `lasting` all that follow too."""
    library = ctypes.CDLL(None)
    refusals = Refusals()
    arm = library.failing_host_arm
    arm.argtypes = (ctypes.c_uint, ctypes.c_long, ctypes.c_long, ctypes.c_int)
    library.failing_host_seen.restype = library.failing_host_failed.restype = ctypes.c_long
    arm(calls, at, _LAST if lasting else at, errno)
    try:
        yield refusals
    finally:
        refusals.seen, refusals.failed = library.failing_host_seen(), library.failing_host_failed()
        arm(0, 0, 0, 0)
