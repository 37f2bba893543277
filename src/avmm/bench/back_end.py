"""A vhost-user back-end in a process of its own, and what it costs."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
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


@contextlib.contextmanager
def apart(back_end: BackEnd) -> Iterator[None]:
    """Our thread, and those it starts, on a processor of their own: the back-end on the others.

    A guest's processor and the device's thread seldom share one. Left alone on a machine of few,
    the scheduler puts both together now and then: an interrupt then costs a tenth of what it costs
    across processors, and of two that poll each waits out the other's time slice, milliseconds for
    a request. Neither is what a row means to measure.
    """
    cpus = os.sched_getaffinity(0)
    if len(cpus) < 2:
        yield
        return
    own = max(cpus)
    back_end.run_on(cpus - {own})
    os.sched_setaffinity(0, {own})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cpus)
        back_end.run_on(cpus)


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

    def run_on(self, cpus: set[int]) -> None:
        """Let all of its threads run on these processors only."""
        # A worker of the kernel's may be gone by now, and so may all of it.
        with contextlib.suppress(FileNotFoundError):
            for task in os.listdir(f"/proc/{self._process.pid}/task"):
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(int(task), cpus)

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
