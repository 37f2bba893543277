"""A network of our own, in which TAPs can be made without touching the host's."""

from __future__ import annotations

import concurrent.futures
import ctypes
import os
from collections.abc import Callable
from typing import Self, TypeVar

from avmm.errors import HostError

T = TypeVar("T")

_CLONE_NEWNET = 0x4000_0000


class NetworkNamespace:
    """A thread in a network namespace that is new and empty, and goes with what was made in it.

    Threads and processes that run() starts are in it as well. Raises HostError("namespace").
    """

    def __init__(self) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "avmm-bench-net")
        try:
            self.run(_leave_the_hosts)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(self, work: Callable[[], T]) -> T:
        """Do it in there, and wait for it."""
        return self._thread.submit(work).result()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()


def _leave_the_hosts() -> None:
    # The calling thread's alone: the rest of the process stays where it is.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) < 0:
        raise HostError(
            "namespace",
            op="unshare(CLONE_NEWNET)",
            errno=ctypes.get_errno(),
            remedy=None if os.geteuid() == 0 else "run as root",
        )
