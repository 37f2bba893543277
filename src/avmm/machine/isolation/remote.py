"""The program's side of a microVM in a worker process: what MicroVM asks of its machine."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import socket
from collections import deque
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from typing import Any

from avmm.console.console import SCROLLBACK_BYTES, Console, check_scrollback
from avmm.errors import AvmmError, BugError, ConfigError, GuestFault, HostError
from avmm.frozen import FrozenDict
from avmm.hostnet.tap import HostTap
from avmm.log import GuestLog, printable
from avmm.machine.config import Config
from avmm.machine.isolation import messages as say
from avmm.machine.isolation.cgroup import limits_of
from avmm.machine.isolation.consoles import RemoteConsole
from avmm.machine.isolation.files import (
    check_isolation,
    config_values,
    disks_of,
    nics_of,
    open_files,
    open_taps,
)
from avmm.machine.isolation.launch import WorkerProcess, launch
from avmm.machine.isolation.sockets import Sockets, vsock_of
from avmm.machine.lifecycle import uninterrupted
from avmm.machine.parts import Reports, no_vsock
from avmm.machine.reason import ExitKind, ExitReason
from avmm.machine.statistics import MachineStatistics
from avmm.units import MIB
from avmm.virtio.devices.console import VirtioConsole
from avmm.virtio.devices.port import GuestPort
from avmm.virtio.limit import RateLimit
from avmm.vsock.host import VsockHost

log = logging.getLogger(__name__)

GRACE_S = 10.0
RESUME_LIMIT_S = 30.0
"""What a worker has for its end: giving back its memory and what is left of its consoles."""

_LOCKED_EXTRA_BYTES = 64 * MIB


async def build_isolated(config: Config, stack: AsyncExitStack, reports: Reports) -> RemoteMachine:
    """Start a worker and its guest, which runs when this returns.

    Raises what a start in this process raises, and HostError("isolation" | "worker-died").
    """
    check_isolation(config)
    config.check_host()
    with ExitStack() as opened:
        files = open_files(config, opened)
        taps = await open_taps(config, stack)
        process = await uninterrupted(_launched(config, stack))
        machine = RemoteMachine(config, process, reports, stack)
        await machine.start(files, taps, opened)
    return machine


async def _launched(config: Config, stack: AsyncExitStack) -> WorkerProcess:
    process = await launch()
    stack.push_async_callback(process.close)
    await process.confine(limits_of(config))
    return process


class RemoteMachine:
    """See parts.Machine. Loop."""

    def __init__(
        self, config: Config, process: WorkerProcess, reports: Reports, stack: AsyncExitStack
    ) -> None:
        self.process = process
        self._config = config
        self._reports = reports
        self._stack = stack
        self._disks, self._nics = disks_of(config), nics_of(config)
        self._consoles: dict[str, RemoteConsole] = {}
        self._line: say.Line
        self._statistics: MachineStatistics | None = None
        self._asked: deque[asyncio.Future[None]] = deque()
        self._probed: deque[asyncio.Future[str]] = deque()
        self._reader: asyncio.Task[None] | None = None
        self._stopping = False
        self._ended = False
        self._broken: AvmmError | None = None
        self._gone: AvmmError | None = None
        self._log = GuestLog()
        self._sockets: Sockets | None = None

    async def start(
        self, files: list[tuple[str, int, int]], taps: list[HostTap], opened: ExitStack
    ) -> None:
        """Hand over the files, which `opened` closes, and the TAPs; wait until the guest runs."""
        control = self.process.control
        reader, writer = await asyncio.open_unix_connection(sock=control.dup())
        self._line = say.Line(reader, writer, say.News)
        self._stack.push_async_callback(self._line.closed)
        names = ["serial", "console"] if self._config.console else ["serial"]
        vsock = vsock_of(self._config)
        setup = say.Setup(
            config=config_values(self._config),
            files=[(path, flags) for path, flags, _ in files],
            taps=[say.HandedTap(tap.name, len(tap.fds), tap.mtu, tap.uso) for tap in taps],
            consoles=names,
            vsock=vsock is not None,
            uid=self.process.uid,
            locked_bytes=self._config.memory_bytes + _LOCKED_EXTRA_BYTES,
            log_level=logging.getLogger("avmm").getEffectiveLevel(),
        )
        fds = [fd for _, _, fd in files] + [fd for tap in taps for fd in tap.fds]
        fds += [self._add_console(name, opened) for name in names]
        if vsock is not None:
            self._sockets = Sockets(vsock, self._line, self._log, self._break, self._stack)
            fds += self._sockets.theirs(opened)
        with contextlib.suppress(BrokenPipeError):  # it died: what is read next says so
            await _send(control, say.packed(setup), fds)
        opened.close()
        while True:
            record = await self._line.next()
            if isinstance(record, say.Running):
                self._take_statistics(record.statistics)
                return
            if isinstance(record, say.Failed):
                raise say.error_of(record.failure)
            if record is None:
                raise await self._death()
            self._dispatch(record)

    @property
    def serial_console(self) -> Console:
        """See Machine, here and below."""
        return self._consoles["serial"].console

    @property
    def console(self) -> Console:
        return self._consoles.get("console", self._consoles["serial"]).console

    def port(self, name: str) -> GuestPort:
        raise ConfigError("port", f"port: this microVM has no port {name!r}; it is isolated")

    @property
    def vsock(self) -> VsockHost:
        if self._sockets is None:
            raise no_vsock()
        return self._sockets.host

    def go(self) -> None:
        self._reader = asyncio.get_running_loop().create_task(self._read(), name="avmm-worker")

    def stop(self) -> None:
        if not self._stopping:
            self._stopping = True
            self._line.say(say.Stop())
            for console in self._consoles.values():
                console.rush()

    async def pause(self, check: Callable[[], None]) -> None:
        if self._sockets is not None:
            self._sockets.hold()
        try:
            await self._ask(say.Pause())
        except AvmmError:
            check()
            raise

    async def resume(self, alive: Callable[[], bool]) -> None:
        """Whatever holds the guest, nothing holds a worker that is still ours for so long."""
        if not alive() or self._gone is not None:
            return
        try:
            async with asyncio.timeout(RESUME_LIMIT_S):
                await self._ask(say.Resume())
        except TimeoutError:
            op = f"An answer to resume() in {RESUME_LIMIT_S:g} s"
            error = HostError("worker-protocol", op=op)
            self._break(error)
            raise error from None
        if self._sockets is not None:
            self._sockets.resume()

    def press_power_button(self) -> None:
        self._line.say(say.PressPower())

    def set_link(self, id: str, up: bool) -> None:
        if id not in self._nics:
            raise ConfigError("device", f"set_link: this microVM has no NIC {id!r}")
        self._line.say(say.SetLink(id, up))

    def set_disk_limit(self, id: str, limit: RateLimit | None) -> None:
        if id not in self._disks:
            raise ConfigError("device", f"set_disk_limit: this microVM has no disk {id!r}")
        self._line.say(say.Limit(id, limit))

    def set_nic_limits(self, id: str, rx: RateLimit | None, tx: RateLimit | None) -> None:
        if id not in self._nics:
            raise ConfigError("device", f"set_nic_limits: this microVM has no NIC {id!r}")
        self._line.say(say.LimitNic(id, rx, tx))

    def statistics(self, state: str, start_s: float) -> MachineStatistics:
        assert self._statistics is not None  # they come with Running
        return dataclasses.replace(self._statistics, state=state, start_s=start_s)

    async def finish(self) -> None:
        self.stop()
        await asyncio.wait([self.process.ended], timeout=GRACE_S)
        if not self.process.ended.done():
            log.warning("Worker %d did not end in %g s", self.process.pid, GRACE_S)
            if not await self.process.end():  # its end of the line stays open: close ours
                log.error("%s", self.process.hangs())
                await self._line.closed()
        if self._reader is not None:
            await asyncio.wait([self._reader])
        for console in self._consoles.values():
            console.finish()

    async def probe(self, code: str) -> str:
        """For tests of the walls; see worker.main()."""
        done: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._probed.append(done)
        self._line.say(say.Probe(code))
        return await done

    def _add_console(self, name: str, theirs: ExitStack) -> int:
        """The end of a pipe for the worker, which `theirs` closes."""
        try:
            ours, there = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as e:
            raise HostError("descriptors", op="pipe", errno=e.errno) from e
        theirs.callback(os.close, there)
        virtio = self._config.console if name == "console" else None
        scrollback = virtio.scrollback if isinstance(virtio, VirtioConsole) else SCROLLBACK_BYTES
        remote = RemoteConsole(
            name,
            ours,
            self._line,
            scrollback_bytes=self._config.scrollback_bytes
            if name == "serial"
            else check_scrollback(scrollback, "scrollback"),
            holds=name == "serial",
            on_closed=self._reports.console_closed if name == "serial" else lambda: None,
        )
        self._stack.callback(remote.finish)
        self._consoles[name] = remote
        return there

    async def _ask(self, record: say.Pause | say.Resume) -> None:
        if self._gone is not None:
            raise self._gone
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._asked.append(done)
        self._line.say(record)
        await done

    async def _read(self) -> None:
        """What the worker says, from the first guest instruction on, and how it ends."""
        try:
            while (record := await self._line.next()) is not None:
                self._dispatch(record)
        except Exception as e:
            self._break(e if isinstance(e, AvmmError) else BugError("worker", repr(e)))
        error = self._gone = await self._death()
        if not self._ended:
            log.error("%s", error)
            self._reports.end(ExitReason(ExitKind.ERROR, str(error), error))
        waiting: list[asyncio.Future[Any]] = [*self._asked, *self._probed]
        for done in waiting:
            if not done.done():
                done.set_exception(error)

    def _break(self, error: AvmmError) -> None:
        """It said what it never would, and cannot be trusted to end by itself any more."""
        if self._broken is None:
            self._broken = error
        self.process.kill()

    async def _death(self) -> AvmmError:
        """Wait until it is gone, which it is about to be; what became of it."""
        if not self.process.given_up:
            await asyncio.wait([self.process.ended], timeout=GRACE_S)
        has_ended = await self.process.end()
        if self._broken is not None:
            return self._broken
        if not has_ended:
            return self.process.hangs()
        words = printable(self.process.last_words.strip())
        return HostError(
            "worker-died",
            op=f"Worker {self.process.pid} of the microVM",
            remedy=f"it {self.process.fate()}" + (f"; its last words: {words}" if words else ""),
        )

    def _dispatch(self, record: object) -> None:
        match record:
            case say.Report():
                self._take_statistics(record.statistics)
            case say.Done():
                self._answer(record)
            case say.Ready():
                self._reports.ready(record.device, record.ready)
            case say.Fault():
                self._reports.fault(record.device, GuestFault(record.kind, record.detail))
            case say.Link():
                self._reports.link(record.device, record.up)
            case say.Taken():
                if console := self._consoles.get(record.console):
                    console.on_taken(record.number)
            case say.Requested() | say.Took() | say.Declined() if self._sockets is not None:
                self._sockets.hear(record)
            case say.Log():
                self._tell(record)
            case say.Probed() if self._probed:
                waiting = self._probed.popleft()
                if not waiting.done():
                    waiting.set_result(record.result)
            case say.Ended():
                self._ended = True
                self._take_statistics(record.statistics)
                self._reports.end(record.reason())
            case _:
                raise HostError("worker-protocol", op=f"{type(record).__name__} out of turn")

    def _answer(self, record: say.Done) -> None:
        if record.statistics is not None:
            self._take_statistics(record.statistics)
        if not self._asked:
            raise HostError("worker-protocol", op="An answer to no question")
        waiting = self._asked.popleft()
        if waiting.done():  # by a cancellation
            return
        if record.failure is None:
            waiting.set_result(None)
        else:
            waiting.set_exception(say.error_of(record.failure))

    def _tell(self, record: say.Log) -> None:
        """A worker that is not ours any more may not fill our log either."""
        # Not by getLogger(), which keeps every name it was ever asked for.
        ours = record.logger.startswith("avmm.")
        known = logging.root.manager.loggerDict.get(record.logger) if ours else None
        logger = known if isinstance(known, logging.Logger) else log
        if logger.isEnabledFor(record.level) and self._log.admits():
            logger.log(record.level, "%s", printable(record.text))

    def _take_statistics(self, statistics: MachineStatistics) -> None:
        devices = {
            id: dataclasses.replace(device, counters=FrozenDict(device.counters))
            for id, device in statistics.devices.items()
        }
        self._statistics = dataclasses.replace(statistics, devices=FrozenDict(devices))


async def _send(control: socket.socket, data: bytes, fds: list[int]) -> None:
    """The first record and all descriptors; the buffer is empty, so it is seldom in two pieces."""
    sent = socket.send_fds(control, [data], fds)
    if sent < len(data):
        await asyncio.get_running_loop().sock_sendall(control, data[sent:])
