"""Starts a worker process and sees it end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from avmm.descriptors import closing_fd
from avmm.errors import HostError
from avmm.loop import add_reader, on_thread
from avmm.machine.isolation.cgroup import WorkerGroup

LAUNCHER = Path(__file__).with_name("avmm-launch")
CONTROL_FD = 3
_ABOVE = 16
"""Descriptors from here on do not collide with those that the launcher is given."""

_REPORT_MAX_BYTES = 200
_LAST_WORDS_BYTES = 4000
_PACKAGES = str(Path(__file__).parents[3])
_KEPT_ENVIRONMENT = ("LD_LIBRARY_PATH",)
"""Without it the interpreter may not start; what else is there may be a secret."""

GONE_S = 30.0
"""What a killed process has for its end, which takes longer when the kernel has to wait for the
storage of a disk."""

ENTRY = "from avmm.machine.isolation.worker import main; main()"

_REMEDY = (
    "without the host's root the kernel has to allow user namespaces: see "
    "kernel.apparmor_restrict_unprivileged_userns, kernel.unprivileged_userns_clone and "
    "user.max_user_namespaces"
)


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """How a process ended: with a code, or by a signal; neither, when somebody else reaped it."""

    code: int | None = None
    signal: int | None = None

    def described(self) -> str:
        """For people: what it did."""
        if self.signal is not None:
            name = signal.Signals(self.signal).name
            forbidden = self.signal == signal.SIGSYS
            return f"was killed by {name}" + (", for a forbidden system call" * forbidden)
        return "ended" if self.code is None else f"ended with status {self.code}"


class WorkerProcess:
    """A child of this process. Loop. control: our end of its socket. uid: the user that it has to
    become; None where a user namespace is its own."""

    def __init__(
        self, pid: int, pidfd: int, control: socket.socket, errors: int, *, uid: int | None
    ) -> None:
        self.pid = pid
        self.control = control
        self.uid = uid
        self._pidfd = pidfd
        self._errors = errors
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[ExitStatus] = self._loop.create_future()
        self.last_words = ""
        self.killed_for: str | None = None
        self.given_up = False
        self._group: WorkerGroup | None = None
        add_reader(self._loop, pidfd, self._on_end)

    async def confine(self, limits: Mapping[str, int]) -> None:
        """Put it into a control group with these limits, where there can be one.

        To be awaited to the end: uninterrupted(). Raises HostError("thread").
        """
        # On a thread: the kernel takes some 20 ms to move a process into another group.
        name = f"avmm-{self.pid}"
        self._group = await on_thread(WorkerGroup.make, name, self.pid, limits)
        if self.ended.done():
            self._leave_group()

    def kill(self) -> None:
        """SIGKILL. Idempotent."""
        if not self.ended.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def end(self) -> bool:
        """Kill it if it is there, and wait for its end; False: that does not come, not now."""
        self.kill()
        if not self.given_up:
            await asyncio.wait([self.ended], timeout=GONE_S)
        self.given_up = not self.ended.done()
        return not self.given_up

    def fate(self) -> str:
        """Of one that has ended, for people."""
        status = self.ended.result().described()
        return status if self.killed_for is None else f"{status}, {self.killed_for}"

    def hangs(self) -> HostError:
        """What to say of one that does not end."""
        return HostError(
            "disk-hangs",
            op=f"Worker {self.pid} of the microVM",
            remedy=f"it was killed and did not end within {GONE_S:g} s, as when a disk's storage "
            "does not answer; the guest's memory and the disks' locks are given back when it does",
        )

    async def close(self) -> None:
        """Kill it if it is there, wait for its end, and give back what we have of it.

        Raises HostError("disk-hangs") for one that does not end; it is reaped when it does.
        """
        try:
            if not await self.end():
                raise self.hangs()
            if self._group is not None:
                await self._group.removed()
        finally:
            self.control.close()

    def _on_end(self) -> None:
        self._loop.remove_reader(self._pidfd)
        status = _reap(self._pidfd)
        os.close(self._pidfd)
        self.last_words = _read_now(self._errors, _LAST_WORDS_BYTES).decode(errors="replace")
        os.close(self._errors)
        self._leave_group()
        self.ended.set_result(status)

    def _leave_group(self) -> None:
        """It has ended, maybe after it was given up, when nobody else removes its group."""
        if self._group is not None:
            self.killed_for = self._group.killed_for()
            self._group.remove()


async def launch() -> WorkerProcess:
    """A worker that waits for its setup. To be awaited to the end: uninterrupted().

    Raises HostError("isolation" | "worker"), and then there is none.
    """
    if not LAUNCHER.exists():
        raise HostError(
            "isolation", op="open", path=str(LAUNCHER), remedy="avmm was built without it"
        )
    with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
        try:
            control, control_there = socket.socketpair()
            ours.callback(control.close)
            theirs.callback(control_there.close)
            errors, errors_there = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            ours.callback(os.close, errors)
            theirs.callback(os.close, errors_there)
            report, report_there = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            theirs.callback(os.close, report)
            with closing_fd(report_there):
                launcher = _spawn(report_there, errors_there, control_there.fileno())
        except OSError as e:
            raise HostError("worker", op="Starting a worker", errno=e.errno) from e
        line = await _read_line(report)
        _wait_for(launcher)
        pid, uid = _parsed(line)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as e:
            os.kill(pid, signal.SIGKILL)
            _wait_for(pid)
            raise HostError("worker", op="pidfd_open", errno=e.errno) from e
        control.setblocking(False)
        worker = WorkerProcess(pid, pidfd, control, errors, uid=uid)
        ours.pop_all()
        return worker


def _spawn(report: int, errors: int, control: int) -> int:
    paths = [_PACKAGES, *(path for path in sys.path if path and path != _PACKAGES)]
    code = f"import sys; sys.path[:] = {paths!r}; {ENTRY}"
    environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
    wanted = {1: report, 2: errors, CONTROL_FD: control}
    with contextlib.ExitStack() as stack:
        actions: list[tuple[object, ...]] = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0)]
        for target, fd in wanted.items():
            copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _ABOVE)
            stack.callback(os.close, copy)
            actions.append((os.POSIX_SPAWN_DUP2, copy, target))
        command = [str(LAUNCHER), sys.executable, "-I", "-S", "-c", code]
        return os.posix_spawn(
            LAUNCHER,
            command,
            {**environment, "UV_USE_IO_URING": "0"},
            file_actions=actions,
            setsigmask=(),
            setsigdef=(signal.SIGPIPE, signal.SIGINT, signal.SIGCHLD),
        )


async def _read_line(fd: int) -> bytes:
    """All that the launcher says."""
    loop = asyncio.get_running_loop()
    text = bytearray()
    while len(text) < _REPORT_MAX_BYTES:
        readable = asyncio.Event()
        add_reader(loop, fd, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(fd)
        try:
            piece = os.read(fd, _REPORT_MAX_BYTES)
        except BlockingIOError:
            continue
        if not piece:
            break
        text += piece
    return bytes(text)


def _parsed(line: bytes) -> tuple[int, int | None]:
    first, _, second = line.decode().strip().partition(" ")
    if first.isdecimal():
        return int(first), int(second) if second.isdecimal() else None
    code = int(second) if second.isdecimal() else errno.EIO
    raise HostError("isolation", op=first.lstrip("!") or "Launching", errno=code, remedy=_REMEDY)


def _wait_for(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):  # somebody waits for all children
        os.waitpid(pid, 0)


def _reap(pidfd: int) -> ExitStatus:
    try:
        info = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    except ChildProcessError:
        return ExitStatus()
    if info is None or info.si_code == os.CLD_EXITED:
        return ExitStatus(code=info.si_status if info is not None else None)
    return ExitStatus(signal=info.si_status)


def _read_now(fd: int, size_bytes: int) -> bytes:
    try:
        return os.read(fd, size_bytes)
    except BlockingIOError:
        return b""
