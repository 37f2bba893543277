"""The agent in a guest, as its host sees it."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Unpack

from avmm.agent import protocol
from avmm.agent.connection import Connect, Connection
from avmm.agent.files import Files
from avmm.agent.process import (
    OUTPUT_MAX_BYTES,
    PIPE,
    ExecOptions,
    Process,
    Session,
    start_session,
)
from avmm.agent.protocol import Type
from avmm.agent.users import resolve
from avmm.errors import HostError

READY_TIMEOUT_S = 60.0
"""How long a call waits, unless told otherwise, for a guest that is still on its way up."""

_IDLE_MAX = 4
_FIRST_PAUSE_S = 0.005
_PAUSE_MAX_S = 0.1
_TRY_S = 5.0


class Agent:
    """Runs commands and moves files in a guest. All calls belong to one event loop.

    connect: opens a stream to the agent's port. Every operation has a connection to itself; a few
    are kept for the next ones. Whatever goes wrong with the agent is one of these:
    HostError("agent-timeout") when it does not come up, HostError("agent-lost") when it goes away
    in the middle, HostError("agent-version"), HostError("agent-busy"), and
    GuestFault("agent-protocol") when it answers what no agent would.
    """

    def __init__(self, connect: Connect, ready_timeout_s: float = READY_TIMEOUT_S) -> None:
        self._connect = connect
        self._ready_timeout_s = ready_timeout_s
        self._ready = False
        self._closed = False
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()
        self._sessions: set[asyncio.Task[None]] = set()
        self.files = Files(self.connection)

    async def ready(self, timeout: float | None = None) -> None:
        """Wait until the agent answers, which is soon after the guest has its vsock driver.

        timeout: seconds. Raises HostError("agent-timeout").
        """
        limit = self._ready_timeout_s if timeout is None else timeout
        reason = ""
        try:
            async with asyncio.timeout(limit):
                pause = _FIRST_PAUSE_S
                while True:
                    try:
                        async with asyncio.timeout(_TRY_S):
                            await self._first_ping()
                            return
                    except (OSError, HostError) as e:  # TimeoutError is an OSError
                        if self._closed or (isinstance(e, HostError) and e.kind != "agent-lost"):
                            raise
                        reason = f"; the last try: {e}" if str(e) else ""
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, _PAUSE_MAX_S)
        except TimeoutError:
            raise HostError(
                "agent-timeout",
                op="The guest's agent",
                remedy=f"it did not answer within {limit:g} s; does the guest load its vsock "
                f"modules?{reason}",
            ) from None

    async def exec(self, argv: Sequence[str], **options: Unpack[ExecOptions]) -> Process:
        """Start a command in the guest; as asyncio.create_subprocess_exec(), see ExecOptions.

        A command that cannot be started raises OSError as the guest's kernel has it, such as
        FileNotFoundError. Cancelled, it leaves no process behind.
        """
        return Process(await self._start(argv, options))

    async def run(
        self,
        argv: Sequence[str],
        *,
        input: bytes | None = None,
        timeout: float | None = None,
        check: bool = False,
        output_max: int | None = None,
        **options: Unpack[ExecOptions],
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command to its end; as subprocess.run(capture_output=True).

        timeout: seconds, then TimeoutError. check: raises subprocess.CalledProcessError for an
        exit status other than 0. output_max: bytes of stdout, and of stderr (64 MiB), beyond which
        HostError("output-limit") is raised. On every early way out the command is killed.
        """
        if input is not None:
            options["stdin"] = PIPE
        async with asyncio.timeout(timeout), await self.exec(argv, **options) as process:
            most = OUTPUT_MAX_BYTES if output_max is None else output_max
            stdout, stderr = await process.communicate(input, most)
            code = await process.wait()
        done = subprocess.CompletedProcess(list(argv), code, stdout or b"", stderr or b"")
        if check:
            done.check_returncode()
        return done

    async def ping(self) -> float:
        """Seconds to the agent and back."""
        async with self.connection() as connection:
            began = time.perf_counter()
            protocol.unpack_clock(await connection.request(Type.PING))
            return time.perf_counter() - began

    async def clock(self) -> float:
        """The guest's time, in seconds since 1970."""
        async with self.connection() as connection:
            return protocol.unpack_clock(await connection.request(Type.PING)) / 1e9

    async def set_clock(self, time_s: float | None = None) -> None:
        """Set the guest's time: seconds since 1970, the host's own when not given."""
        async with self.connection() as connection:
            time_ns = time.time_ns() if time_s is None else int(time_s * 1e9)
            await connection.request(Type.SET_CLOCK, protocol.pack_clock(time_ns))

    async def shutdown(self, *, reboot: bool = False) -> None:
        """Ask for a clean end of the guest; returns when the agent has taken it in hand."""
        async with self.connection() as connection:
            await connection.request(Type.SHUTDOWN, protocol.pack_number(reboot))

    # What follows is for the microVM.

    def close(self) -> None:
        """Give every connection up, and with it the commands that still run. Idempotent."""
        self._closed = True
        for connection in (*self._idle, *self._busy):
            connection.abort()
        self._idle.clear()

    async def closed(self) -> None:
        """close(), and wait until nothing of it is left."""
        self.close()
        for session in self._sessions:
            session.cancel()
        if self._sessions:
            await asyncio.wait(self._sessions)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection for one operation; given up when it fails half-way."""
        connection = await self._acquire()
        try:
            yield connection
        finally:
            self._return(connection)

    async def _start(self, argv: Sequence[str], options: ExecOptions) -> Session:
        uid, gid = await resolve(self.files, options.get("user"), options.get("group"))
        connection = await self._acquire()
        try:
            session = await start_session(connection, argv, uid, gid, options)
        except BaseException:
            self._return(connection)
            raise
        pump = session.pump(lambda: self._return(connection))
        task = asyncio.get_running_loop().create_task(pump, name="avmm-agent-session")
        self._sessions.add(task)
        task.add_done_callback(self._sessions.discard)
        return session

    async def _first_ping(self) -> None:
        connection = await self._open()
        try:
            await connection.request(Type.PING)
        finally:
            self._return(connection)
        self._ready = True

    async def _acquire(self) -> Connection:
        while True:
            if not self._ready:
                await self.ready()  # which leaves an idle one
            while self._idle:
                connection = self._idle.pop()
                if connection.usable:
                    self._busy.add(connection)
                    return connection
                connection.abort()
            try:
                return await self._open()
            except ConnectionError:  # it was there: the guest was restarted, or goes down
                self._ready = False

    async def _open(self) -> Connection:
        """Raises ConnectionError, TimeoutError; HostError("agent-lost") after the end."""
        try:
            if self._closed:
                raise ConnectionError
            reader, writer = await self._connect()
        except OSError as e:
            if not self._closed:
                raise
            raise HostError(
                "agent-lost", op="The guest's agent", remedy="the microVM has ended"
            ) from e
        connection = Connection(reader, writer)
        self._busy.add(connection)
        return connection

    def _return(self, connection: Connection) -> None:
        """Keep it for the next operation if it is fit for one."""
        self._busy.discard(connection)
        fit = connection.settled and connection.usable and not self._closed
        if fit and len(self._idle) < _IDLE_MAX:
            self._idle.append(connection)
        else:
            connection.abort()
