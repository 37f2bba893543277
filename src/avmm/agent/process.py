"""A command that runs in a guest, as asyncio.subprocess.Process is one that runs here."""

from __future__ import annotations

import asyncio
import signal
import weakref
from collections.abc import Callable, Mapping, Sequence
from subprocess import DEVNULL, PIPE, STDOUT
from types import TracebackType
from typing import Self, TypedDict

from avmm.agent import protocol
from avmm.agent.connection import Connection, lost
from avmm.agent.pipes import InputTransport, OutputTransport
from avmm.agent.protocol import ExecFlag, Type, nonsense
from avmm.errors import AvmmError, ConfigError, GuestFault, HostError
from avmm.units import MIB

__all__ = ["DEVNULL", "PIPE", "STDOUT", "ExecOptions", "Process"]

OUTPUT_MAX_BYTES = 64 * MIB
"""What communicate() collects of each stream: the guest is not trusted with the host's memory."""


class ExecOptions(TypedDict, total=False):
    """How a command is run.

    stdin: DEVNULL (the default) or PIPE. stdout: PIPE (the default) or DEVNULL; stderr: also
    STDOUT. limit: of the stream readers, as in asyncio. env: takes the place of the agent's own
    environment, which is that of the guest's init with a PATH; env_extra: is added to it. cwd: "/"
    by default. user, group: numbers, or names of the guest's /etc/passwd and /etc/group; root by
    default, and a user's own group. tty: a terminal of `size` (rows, columns) is stdin (then PIPE),
    stdout and stderr.
    """

    stdin: int | None
    stdout: int | None
    stderr: int | None
    limit: int
    env: Mapping[str, str] | None
    env_extra: Mapping[str, str] | None
    cwd: str | None
    user: str | int | None
    group: str | int | None
    tty: bool
    size: tuple[int, int]


class Session:
    """What happens on a command's connection; lives as long as that is in use for it."""

    def __init__(self, connection: Connection, pid: int, flags: ExecFlag, limit: int) -> None:
        self.connection = connection
        self.pid = pid
        self.tty = bool(flags & ExecFlag.TTY)
        self.returncode: int | None = None
        self.over = False
        """The agent has said its last on this command."""
        self.error: AvmmError | None = None
        self.exited = asyncio.Event()
        self.ended = asyncio.Event()
        self._killed = False
        self._outputs: dict[Type, OutputTransport] = {}
        if not flags & ExecFlag.STDOUT_NULL or self.tty:
            self._outputs[Type.STDOUT] = OutputTransport(connection, Type.STDOUT, limit)
        no_stderr = ExecFlag.STDERR_NULL | ExecFlag.STDERR_TO_STDOUT | ExecFlag.TTY
        if not flags & no_stderr:
            self._outputs[Type.STDERR] = OutputTransport(connection, Type.STDERR, limit)
        piped = not flags & ExecFlag.STDIN_NULL or self.tty
        self._input = InputTransport(connection) if piped else None

    @property
    def stdin(self) -> asyncio.StreamWriter | None:
        """None when it is not a pipe; so for the others."""
        return self._input.writer if self._input else None

    def output(self, type: Type) -> asyncio.StreamReader | None:
        """The reader of stdout or stderr."""
        transport = self._outputs.get(type)
        return transport.reader if transport else None

    async def pump(self, release: Callable[[], None]) -> None:
        """Take what the agent sends until it has sent all; `release` is called then."""
        error: AvmmError = lost()
        try:
            while not self.over:
                self._take(*await self.connection.receive())
        except (HostError, GuestFault) as e:
            error = e
        finally:
            release()
            self._end(error)

    def kill_now(self) -> None:
        """Give the connection up: the agent kills the command and all of its group.

        Nothing to do for a command of which nothing but the agent's last word is to come.
        """
        finishing = self.returncode is not None and all(
            output.is_closing() for output in self._outputs.values()
        )
        if not self.ended.is_set() and not finishing:
            self._killed = True
            self.connection.abort()

    def check_running(self) -> None:
        """Raises ProcessLookupError when the command has ended."""
        if self.returncode is not None or self.ended.is_set():
            raise ProcessLookupError(f"The guest's process {self.pid} has ended")

    def _take(self, type: Type, payload: bytes) -> None:
        if type in self._outputs:
            self._outputs[type].take(payload)
        elif type is Type.WINDOW and self._input:
            self._input.allow(protocol.unpack_window(payload))
        elif type is Type.STDIN and self._input and not payload:
            self._input.refuse()
        elif type is Type.EXITED and self.returncode is None:
            self.returncode = protocol.unpack_exited(payload)
            self.exited.set()
        elif type is Type.END and self.returncode is not None:
            self.over = self.connection.settled = True
        else:
            raise nonsense(f"{type.name} of {len(payload)} bytes for a running command")

    def _end(self, error: AvmmError) -> None:
        clean = self.over or self._killed
        if self.returncode is None:
            if self._killed:
                self.returncode = -signal.SIGKILL
            else:
                self.error = error
        for output in self._outputs.values():
            output.end(None if clean else error)
        if self._input:
            self._input.refuse()
        self.exited.set()
        self.ended.set()


async def start_session(
    connection: Connection, argv: Sequence[str], uid: int, gid: int, options: ExecOptions
) -> Session:
    """Have the agent start a command. Raises OSError, ConfigError("exec")."""
    if isinstance(argv, str | bytes) or not argv:
        raise ConfigError("exec", "exec: give the program and its arguments as a list of strings")
    flags = _flags(options)
    env, extra = options.get("env"), options.get("env_extra")
    if extra:
        if env is not None:
            raise ConfigError("exec", "exec: give env or env_extra, not both")
        env = extra
        flags |= ExecFlag.ENV_ADDED
    try:
        payload = protocol.pack_exec(
            argv,
            flags=flags,
            cwd=options.get("cwd") or "",
            env=env,
            uid=uid,
            gid=gid,
            size=options.get("size", (24, 80)),
        )
    except ValueError as e:
        raise ConfigError("exec", str(e)) from e
    connection.send(Type.EXEC, payload)
    pid = protocol.unpack_number(await connection.expect(Type.STARTED))
    return Session(connection, pid, flags, options.get("limit", 64 * 1024))


def _flags(options: ExecOptions) -> ExecFlag:
    flags = ExecFlag(0)
    stdin, stdout, stderr = (options.get(name) for name in ("stdin", "stdout", "stderr"))
    for name, value, allowed in (
        ("stdin", stdin, (None, PIPE, DEVNULL)),
        ("stdout", stdout, (None, PIPE, DEVNULL)),
        ("stderr", stderr, (None, PIPE, DEVNULL, STDOUT)),
    ):
        if value not in allowed:
            raise ConfigError("exec", f"exec: {name}={value!r}: PIPE or DEVNULL is needed")
    if options.get("tty"):
        return ExecFlag.TTY
    if stdin != PIPE:
        flags |= ExecFlag.STDIN_NULL
    if stdout == DEVNULL:
        flags |= ExecFlag.STDOUT_NULL
    if stderr == DEVNULL:
        flags |= ExecFlag.STDERR_NULL
    elif stderr == STDOUT:
        flags |= ExecFlag.STDERR_TO_STDOUT
    return flags


class Process:
    """A command in a guest, with the names and rules of asyncio.subprocess.Process.

    The streams have flow control all the way: a command whose output nobody reads stops, and its
    input is taken no faster than it reads. A cancelled communicate() kills the command with all of
    its process group, leaving an `async with` block does so, and so does dropping the last
    reference to this object. A cancelled wait() only stops waiting, as in asyncio.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.stdin = session.stdin
        self.stdout = session.output(Type.STDOUT)
        self.stderr = session.output(Type.STDERR)
        loop = asyncio.get_running_loop()
        weakref.finalize(self, _forget, loop, session).atexit = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
        await self._session.ended.wait()

    @property
    def pid(self) -> int:
        """The process id in the guest."""
        return self._session.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, the negative number of the signal that ended it, or None."""
        return self._session.returncode

    async def wait(self) -> int:
        """Wait for the end; the return code.

        A command that fills a pipe nobody reads does not end: use communicate() then. Raises
        HostError("agent-lost") when the guest or its agent ends first.
        """
        await self._session.exited.wait()
        if self._session.returncode is None:
            assert self._session.error is not None
            raise self._session.error
        return self._session.returncode

    async def communicate(
        self, input: bytes | None = None, output_max: int = OUTPUT_MAX_BYTES
    ) -> tuple[bytes | None, bytes | None]:
        """Feed stdin, collect stdout and stderr, wait for the end; None for what is no pipe.

        output_max: bytes of each, beyond which the command is killed and
        HostError("output-limit") raised.
        """
        jobs = [
            asyncio.ensure_future(self._feed(input)),
            asyncio.ensure_future(_collect(self.stdout, output_max)),
            asyncio.ensure_future(_collect(self.stderr, output_max)),
        ]
        try:
            _, stdout, stderr = await asyncio.gather(*jobs)
            await self.wait()
        except BaseException:
            self._session.kill_now()
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)
            raise
        return stdout, stderr

    def send_signal(self, number: int) -> None:
        """Send a signal to the command itself. Raises ProcessLookupError when it has ended."""
        self._signal(number, group=False)

    def terminate(self) -> None:
        """Send SIGTERM to the command itself."""
        self._signal(signal.SIGTERM, group=False)

    def kill(self) -> None:
        """Send SIGKILL to the command and all of its process group."""
        self._signal(signal.SIGKILL, group=True)

    def signal_group(self, number: int) -> None:
        """Send a signal to the command and all of its process group, as a terminal's keys do."""
        self._signal(number, group=True)

    def resize(self, rows: int, columns: int) -> None:
        """Tell a command with tty=True the new size of its terminal."""
        if not self._session.tty:
            raise ConfigError("exec", "resize: the command has no terminal; start it with tty=True")
        if not self._session.ended.is_set():
            self._session.connection.send(Type.RESIZE, protocol.pack_size(rows, columns))

    def close(self) -> None:
        """Kill the command and its process group if it runs, and drop what is left of its output.

        Idempotent; returns at once.
        """
        self._session.kill_now()

    def _signal(self, number: int, *, group: bool) -> None:
        if not 1 <= number <= 64:
            raise ValueError(f"{number} is no signal")
        self._session.check_running()
        self._session.connection.send(Type.SIGNAL, protocol.pack_signal(number, group=group))

    async def _feed(self, input: bytes | None) -> None:
        if self.stdin is None:
            return
        try:
            if input:
                self.stdin.write(input)
                await self.stdin.drain()
            self.stdin.close()
            await self.stdin.wait_closed()
        except ConnectionError:
            pass  # the command did not want all of it


async def _collect(reader: asyncio.StreamReader | None, most: int) -> bytes | None:
    if reader is None:
        return None
    chunks: list[bytes] = []
    size = 0
    while chunk := await reader.read(256 * 1024):
        size += len(chunk)
        if size > most:
            raise HostError(
                "output-limit",
                op="communicate",
                remedy=f"the command wrote more than {most} bytes; read its streams piece by "
                "piece, or raise output_max",
            )
        chunks.append(chunk)
    return b"".join(chunks)


def _forget(loop: asyncio.AbstractEventLoop, session: Session) -> None:
    """From whatever thread drops the last reference, and at whatever time."""
    if not session.ended.is_set() and not loop.is_closed():
        loop.call_soon_threadsafe(session.kill_now)
