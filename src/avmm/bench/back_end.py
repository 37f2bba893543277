"""A vhost-user back-end in a process of its own, and what it costs."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Self

from avmm.errors import HostError

AVMM_COMMAND = (sys.executable, "-m", "avmm")

_START_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 10.0
_POLL_S = 0.02


def tool(name: str, package: str) -> str:
    """The path of a program; HostError("tool") names the package that has it."""
    found = shutil.which(name)
    if found is None:
        raise HostError("tool", op=name, remedy=f"it is not installed: apt-get install {package}")
    return found


class BackEnd:
    """Runs `command` until close(); it listens at `path` when the constructor returns.

    Raises HostError("back-end") with its last words when it ends before it listens.
    """

    def __init__(self, name: str, command: Sequence[str], path: str) -> None:
        self.name = name
        self.path = path
        self._log_fd = os.memfd_create(name, os.MFD_CLOEXEC)
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._log_fd, stderr=self._log_fd
        )
        # The number of a process' CPU clock, as clock_getcpuclockid(3) makes it.
        self._clock = ~self._process.pid << 3 | 2
        try:
            self._wait_until_it_listens()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def cpu_s(self) -> float:
        """CPU time of all of its threads so far, the kernel's workers for it included."""
        return time.clock_gettime(self._clock)

    def close(self) -> None:
        """End it. Idempotent."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._log_fd >= 0:
            os.close(self._log_fd)
            self._log_fd = -1

    def _wait_until_it_listens(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._listens():
            status = self._process.poll()
            if status is not None or time.monotonic() > deadline:
                log = os.pread(self._log_fd, 65536, 0)
                words = log.decode(errors="replace").strip().splitlines()
                last = words[-1] if words else f"status {status}, and it said nothing"
                raise HostError("back-end", op=f"Starting {self.name}", remedy=last)
            time.sleep(_POLL_S)

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(self.path)
            except (FileNotFoundError, ConnectionRefusedError):
                return False
            return True
