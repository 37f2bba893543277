"""The worker process: an ordinary microVM, behind walls, that does what its program says."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec

from avmm.boot import elf
from avmm.errors import AvmmError, BugError, HostError
from avmm.loop import run as run_loop
from avmm.machine.builder import build
from avmm.machine.config import Config
from avmm.machine.events import (
    DeviceFault,
    DriverGone,
    DriverReady,
    Events,
    EventsLost,
    LinkChanged,
)
from avmm.machine.isolation import messages as say
from avmm.machine.isolation.consoles import ConsoleRelay
from avmm.machine.isolation.files import Handed
from avmm.machine.isolation.launch import CONTROL_FD
from avmm.machine.isolation.relay import SocketRelay
from avmm.machine.machine import MicroVM
from avmm.machine.parts import Machine
from avmm.machine.reason import ExitReason
from avmm.native import lib
from avmm.virtio.devices.vsock import VsockDevice

log = logging.getLogger(__name__)

_REPORT_S = 0.5
"""How old the counters may be that the program has."""

_BEHIND_BYTES = 1 << 20
_DESCRIPTORS_MAX = 4096
_FDS_MAX = 253  # that a message on a unix socket may carry
_VSOCK_FDS = 2

Probe = Callable[[str], str]


class _WorkerVM(MicroVM):
    """Made of what was handed in."""

    def __init__(
        self, config: Config, handed: Handed, line: say.Line, vsock: Sequence[int]
    ) -> None:
        super().__init__(config)
        self._handed = handed
        self._line = line
        self._vsock = vsock
        self.relay: SocketRelay | None = None

    @property
    def machine(self) -> Machine:
        """Of a guest that runs."""
        assert self._machine is not None
        return self._machine

    @property
    def reason(self) -> ExitReason:
        """Why its guest ended, which it has."""
        assert self._ended is not None
        return self._ended.result()

    async def _build(self) -> Machine:
        handed = self._handed
        parts = await build(self.config, self._stack, self._reports(), handed, handed.open_tap)
        for device in parts.devices.values():
            if isinstance(device, VsockDevice):
                self.relay = SocketRelay(device, self._line, *self._vsock)
                self._stack.callback(self.relay.close)
        return parts


def main(probe: Probe | None = None) -> None:
    """The whole life of a worker. probe: answers Probe records, in tests of the walls."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=CONTROL_FD)
    setup, fds = _receive_setup(control)
    code = run_loop(_serve(control, setup, fds, probe))
    # Nothing is left to be done that needs Python's own end, which takes 20 ms.
    os._exit(code)


def _receive_setup(control: socket.socket) -> tuple[say.Setup, list[int]]:
    """Of a program that died before it said anything: the end."""
    data, fds = bytearray(), list[int]()
    while len(data) < say.LENGTH_BYTES or len(data) < say.LENGTH_BYTES + _length(data):
        piece, more, _, _ = socket.recv_fds(control, 1 << 20, _FDS_MAX)
        if not piece:
            os._exit(0)
        data += piece
        fds += more
    return msgspec.msgpack.decode(data[say.LENGTH_BYTES :], type=say.Setup), fds


def _length(data: bytearray) -> int:
    return int.from_bytes(data[: say.LENGTH_BYTES], "little")


async def _serve(
    control: socket.socket, setup: say.Setup, fds: Sequence[int], probe: Probe | None
) -> int:
    """Status of the process."""
    reader, writer = await asyncio.open_unix_connection(sock=control)
    line = say.Line(reader, writer, say.Command)
    _log_to(line, setup.log_level)
    vsock = len(fds) - (_VSOCK_FDS if setup.vsock else 0)
    consoles = vsock - len(setup.consoles)
    try:
        _import_for(setup, fds)
        config = Config.from_values(setup.config, "worker")
        landlock = _raise_walls(setup)
        handed = Handed(setup.files, fds[:consoles], setup.taps)
        vm = _WorkerVM(config, handed, line, fds[vsock:])
        events = vm.events()
        await vm.start()
    except Exception as e:
        if not isinstance(e, AvmmError):
            log.error("The worker failed", exc_info=True)
        line.say(say.Failed(say.failure_of(e)))
        await line.sent()
        return 1
    _check_native(lib.av_walls_filter(lib.AV_ROLE_LOOP), "seccomp")
    names = zip(setup.consoles, fds[consoles:vsock], strict=True)
    worker = _Worker(vm, line, events, dict(names), probe)
    line.say(say.Running(landlock, vm.statistics()))
    return await worker.live()


class _Worker:
    """A guest that runs, and its program on the other end of the line."""

    def __init__(
        self,
        vm: _WorkerVM,
        line: say.Line,
        events: Events,
        pipes: dict[str, int],
        probe: Probe | None,
    ) -> None:
        self._vm = vm
        self._line = line
        self._events = events
        self._probe = probe
        consoles = {"serial": vm.serial, "console": vm.console}
        self._relays = {
            name: ConsoleRelay(name, consoles[name], fd, line) for name, fd in pipes.items()
        }
        self._turns: asyncio.Queue[say.Pause | say.Resume] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    async def live(self) -> int:
        """Until the guest has ended and all that is left of it is on its way."""
        forwards = [self._start(relay.forward()) for relay in self._relays.values()]
        for relay in self._relays.values():
            self._start(relay.feed())
        self._start(self._forward_events())
        self._start(self._turn())
        self._start(self._report())
        self._start(self._obey())
        try:
            reason = await self._vm.wait()
        except HostError as e:  # of a disk that hangs: so will the end of this process
            log.error("%s", e)
            reason = self._vm.reason
        self._line.say(say.Ended(reason.kind, reason.detail, self._vm.statistics()))
        await asyncio.wait(forwards)
        with contextlib.suppress(ConnectionError):
            await self._line.sent()
        return 0

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(_die_of_bugs)
        self._tasks.append(task)
        return task

    async def _obey(self) -> None:
        while True:
            record = await self._line.next()
            match record:
                case None:
                    os._exit(1)  # the program is gone: so is everything it would want to know
                case say.Pause() | say.Resume():
                    self._turns.put_nowait(record)
                case say.Stop():
                    self._start(self._vm.close())
                case say.PressPower():
                    self._vm.machine.press_power_button()
                case say.Limit() | say.SetLink() | say.LimitNic():
                    self._change(record)
                case say.Input():
                    self._relays[record.console].put(record)
                case say.Resize():
                    self._relays[record.console].resize(record.columns, record.rows)
                case say.Refuse() if self._vm.relay is not None:
                    self._vm.relay.refuse(record)
                case say.Probe() if self._probe is not None:
                    self._line.say(say.Probed(self._probe(record.code)))
                case _:
                    raise BugError("worker", f"{type(record).__name__} out of turn")

    def _change(self, record: say.Limit | say.SetLink | say.LimitNic) -> None:
        """Nobody waits for it, so what the host refuses is told by the log."""
        try:
            match record:
                case say.Limit():
                    self._vm.set_disk_limit(record.id, record.limit)
                case say.SetLink():
                    self._vm.set_link(record.id, record.up)
                case say.LimitNic():
                    self._vm.set_nic_limits(record.id, rx=record.rx, tx=record.tx)
        except HostError as e:
            log.error("%s stays as it was: %s", record.id, e)

    async def _turn(self) -> None:
        """Pauses and their ends, in the order they were asked for."""
        while True:
            record = await self._turns.get()
            failure = None
            try:
                await (self._vm.pause() if isinstance(record, say.Pause) else self._vm.resume())
            except AvmmError as e:
                failure = say.failure_of(e)
            self._line.say(say.Done(failure, self._vm.statistics()))

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(_REPORT_S)
            if self._line.waiting_bytes < _BEHIND_BYTES:
                self._line.say(say.Report(self._vm.statistics()))

    async def _forward_events(self) -> None:
        async for event in self._events:
            match event:
                case DriverReady() | DriverGone():
                    self._line.say(say.Ready(event.device, isinstance(event, DriverReady)))
                case DeviceFault():
                    self._line.say(say.Fault(event.device, event.kind, event.detail))
                case LinkChanged():
                    self._line.say(say.Link(event.device, event.up))
                case EventsLost():
                    log.warning("%d events were lost on the way", event.count)
            await self._line.sent()


def _die_of_bugs(task: asyncio.Task[None]) -> None:
    """What a task of ours raises is a bug; the program sees a worker that died of it."""
    if not task.cancelled() and (error := task.exception()) is not None:
        os.write(2, f"{type(error).__name__}: {error}\n".encode()[:1000])
        os._exit(1)


class _LineHandler(logging.Handler):
    def __init__(self, line: say.Line) -> None:
        super().__init__()
        self._line = line
        self._loop = asyncio.get_running_loop()

    def emit(self, record: logging.LogRecord) -> None:
        line = say.Log(record.name, record.levelno, self.format(record)[:4000])
        self._loop.call_soon_threadsafe(self._line.say, line)


def _log_to(line: say.Line, level: int) -> None:
    logger = logging.getLogger("avmm")
    logger.setLevel(level)
    logger.propagate = False
    logger.addHandler(_LineHandler(line))


def _import_for(setup: say.Setup, fds: Sequence[int]) -> None:
    """What would be imported later, when there are no files any more."""
    import encodings.idna  # noqa: F401
    import traceback  # noqa: F401

    kernel = setup.config["kernel"]
    for (path, _), fd in zip(setup.files, fds, strict=False):
        if path == kernel and os.pread(fd, len(elf.MAGIC), 0) != elf.MAGIC:
            import lz4.block  # noqa: F401
            import zstandard  # noqa: F401


def _raise_walls(setup: say.Setup) -> int:
    """The ABI of Landlock that is in use. Raises HostError("isolation")."""
    _limit_resources(setup)
    _check_native(lib.av_walls_root(), "pivot_root")
    uid = -1 if setup.uid is None else setup.uid
    _check_native(lib.av_walls_identity(uid, uid), "setresuid")
    landlock = _check_native(lib.av_walls_landlock(), "landlock_restrict_self")
    _check_native(lib.av_walls_filter(lib.AV_ROLE_BUILD), "seccomp")
    return landlock


def _limit_resources(setup: say.Setup) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(most, _DESCRIPTORS_MAX) if most != resource.RLIM_INFINITY else _DESCRIPTORS_MAX
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if setup.uid is not None:
        # As root it had no limit. Without the right to say so, a disk that needs more will tell.
        with contextlib.suppress(ValueError):
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (setup.locked_bytes, setup.locked_bytes))


def _check_native(result: int, op: str) -> int:
    if result < 0:
        raise HostError("isolation", op=op, errno=-result)
    return result
