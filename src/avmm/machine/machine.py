"""MicroVM: one virtual machine as an asyncio object."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from avmm.agent.protocol import AGENT_PORT
from avmm.console.console import Console
from avmm.errors import ConfigError, GuestFault
from avmm.machine.builder import build
from avmm.machine.config import Config
from avmm.machine.events import (
    EVENTS_LIMIT,
    ConsoleClosed,
    DeviceFault,
    DriverGone,
    DriverReady,
    Ended,
    EventHub,
    Events,
    LinkChanged,
    Paused,
    Resumed,
    Started,
    StopRequested,
)
from avmm.machine.guest import GuestCalls
from avmm.machine.lifecycle import State, uninterrupted
from avmm.machine.parts import Machine, Reports
from avmm.machine.reason import ExitKind, ExitReason
from avmm.machine.statistics import MachineStatistics
from avmm.virtio.devices.port import GuestPort
from avmm.virtio.limit import RateLimit
from avmm.vsock.host import VsockHost

if TYPE_CHECKING:
    from avmm.agent.client import Agent

log = logging.getLogger(__name__)


class MicroVM(GuestCalls):
    """A microVM, which lives once: new, starting, running (or paused), stopping, stopped.

    `async with MicroVM(config) as vm:` starts it and, on every way out, stops it and gives back
    whatever it held: descriptors, threads, memory, TAPs. A task that is cancelled while it starts
    or inside the block takes the guest with it. asyncio.timeout() works around every call.

    It belongs to the event loop on which start() or events() was called first; a call from another
    loop or thread raises ConfigError("loop") and does nothing. A call that does not fit the state,
    such as a second start(), raises ConfigError("state"). After the end wait(), stop(), kill(),
    close(), statistics() and what the console has keep answering, and then from anywhere.

    isolation: "process" for a worker process of its own, behind walls (docs/security.md). While
    the guest runs statistics() are up to half a second old then, and when the worker dies the
    ExitReason's error is a HostError("worker-died"). Raises ConfigError("isolation") for what
    cannot be had with it: ports, vhost=on, and disks, NICs and devices in Python.
    """

    def __init__(self, config: Config, *, isolation: Literal["process"] | None = None) -> None:
        if isolation not in (None, "process"):
            raise ConfigError("isolation", f"isolation: {isolation!r} is not 'process' or None")
        if isolation is not None:
            from avmm.machine.isolation.files import check_isolation

            check_isolation(config)
        self.config = config
        self.isolation = isolation
        self._state = State.NEW
        self._machine: Machine | None = None
        self._stack = AsyncExitStack()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0
        self._started: asyncio.Future[None] | None = None
        self._ended: asyncio.Future[ExitReason] | None = None
        self._life: asyncio.Task[ExitReason] | None = None
        self._turning = asyncio.Lock()
        self._events = EventHub()
        self._last_statistics: MachineStatistics | None = None
        self._guest_agent: Agent | None = None
        self._start_s = 0.0
        self._stop_asked = False
        self._close_asked = False

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def state(self) -> State:
        """Where in its life the microVM is. Any thread."""
        return self._state

    @property
    def console(self) -> Console:
        """The guest's console, on virtio with Config(console=True) and else `serial`; also after
        the guest ended, for what it printed."""
        return self._machine_for("console", ended=True).console

    @property
    def serial(self) -> Console:
        """The console on the serial port, which every guest has; as `console`."""
        return self._machine_for("serial", ended=True).serial_console

    def port(self, name: str) -> GuestPort:
        """A port of Config(ports=Ports([...])), to be opened. Raises ConfigError("port")."""
        return self._machine_for("port", ended=True).port(name)

    @property
    def vsock(self) -> VsockHost:
        """Streams to programs of the guest, and from them; with Config(vsock=...)."""
        return self._machine_for("vsock", ended=True).vsock

    async def start(self) -> None:
        """Build the machine and let the guest run; once per object.

        Raises ConfigError or HostError; whatever was made by then is gone when it does, and
        likewise when the task is cancelled or another one calls close() meanwhile.
        """
        if self._state is not State.NEW:
            raise ConfigError("state", f"start: this microVM is {self._state.value}, not new")
        self._belong("start")
        self._state = State.STARTING
        began = time.perf_counter()
        self._events.begin()
        loop = asyncio.get_running_loop()
        self._ended, self._started = loop.create_future(), loop.create_future()
        try:
            self._machine = await self._build()
            if self._close_asked:
                raise ConfigError("state", "start: this microVM was closed while it started")
            alive: asyncio.Future[None] = loop.create_future()
            self._life = loop.create_task(self._live(self._machine, alive), name="avmm-microvm")
            # A task that is cancelled before its first step never begins: it has to have begun
            # before anybody relies on what it does in the end.
            await alive
        except BaseException:
            await uninterrupted(self._give_up())
            raise
        finally:
            self._started.set_result(None)
        self._start_s = time.perf_counter() - began
        log.info("microVM runs, %.0f ms after start()", self._start_s * 1000)

    async def wait(self) -> ExitReason:
        """Wait until the guest has ended and all its resources are given back; why it ended.

        Any number of tasks may wait; cancelling one does nothing to the guest. Raises
        HostError("disk-hangs") when a disk's storage does not answer within 30 s of the end: all
        else is given back then, and the rest when it does.
        """
        if self._life is None:
            raise ConfigError("state", f"wait: {self._described()}")
        if self._life.done():
            return self._life.result()
        self._belong("wait")
        return await asyncio.shield(self._life)

    async def stop(self, grace_s: float | None = None) -> ExitReason:
        """Press the power button and wait; kill the guest after `grace_s` (the config's) seconds.

        The reason is STOPPED when the guest powered off in time, KILLED when it did not.
        """
        machine = self._machine_for("stop", ended=True)

        async def press() -> None:
            machine.press_power_button()

        return await self._stop(press, grace_s)

    async def shutdown(self, grace_s: float | None = None) -> ExitReason:
        """As stop(), but by the guest's agent: for guests that do not listen to a power button.

        The agent asks the guest's init, if that is one it knows (systemd, busybox), and otherwise
        ends all processes, makes the disks' file systems clean and powers off itself. Raises
        ConfigError("agent"), HostError as exec() does.
        """
        self._machine_for("shutdown", ended=True)
        ended = self._ended is None or self._ended.done()
        return await (
            self.wait() if ended else self._stop(self._agent("shutdown").shutdown, grace_s)
        )

    async def kill(self) -> ExitReason:
        """End the guest now, as if its power was cut; acknowledged writes are in the files."""
        self._machine_for("kill", ended=True)
        self._end(ExitReason(ExitKind.KILLED, "killed by its owner"))
        return await self.wait()

    async def pause(self) -> None:
        """Return when no vCPU executes guest instructions and no device has work in flight.

        Cancelled half-way, it lets the guest go on. Raises ConfigError("state") when the guest
        ends first. Nothing to do when it is paused.
        """
        machine = self._machine_for("pause")

        def check() -> None:
            self._machine_for("pause")

        async with self._turning:
            try:
                await machine.pause(check)
                check()
            except BaseException:
                if self._state is State.RUNNING:
                    await uninterrupted(self._go_on(machine))
                raise
            if self._state is State.RUNNING:
                self._state = State.PAUSED
                self._events.publish(Paused(self._events.now()))

    async def resume(self) -> None:
        """Let a paused guest go on; nothing to do when it runs."""
        machine = self._machine_for("resume")
        async with self._turning:
            if self._state is State.PAUSED:
                await uninterrupted(self._go_on(machine))

    def set_link(self, id: str, up: bool) -> None:
        """Plug the cable of a NIC in or out, at both ends.

        id: the device's, "net0" for the first NIC without one of its own. Raises ConfigError when
        there is no such NIC, HostError.
        """
        self._machine_for("set_link").set_link(id, up)

    def set_disk_limit(self, id: str, limit: RateLimit | None) -> None:
        """Limit how much a disk does from now on; None: no more.

        id: the device's, "blk0" for the first disk without one of its own. Raises ConfigError when
        there is no such disk, HostError.
        """
        self._machine_for("set_disk_limit").set_disk_limit(id, limit)

    def set_nic_limits(self, id: str, *, rx: RateLimit | None, tx: RateLimit | None) -> None:
        """Limit what a NIC's guest receives and sends from now on; None: no more.

        id: the device's, "net0" for the first NIC without one of its own. Raises ConfigError when
        there is no such NIC or the kernel serves it (vhost=on), HostError.
        """
        self._machine_for("set_nic_limits").set_nic_limits(id, rx, tx)

    def events(self, limit: int = EVENTS_LIMIT) -> Events:
        """What happens from this call on: `async for event in vm.events()`.

        Each call gives a reader of its own, also before start(). limit: events that wait for it;
        a reader that is slower than that loses the oldest, and an EventsLost says how many. It
        ends when the microVM has ended; one made after that ends at once.
        """
        if self._state is not State.STOPPED:
            self._belong("events")
        return self._events.reader(limit)

    async def close(self) -> None:
        """Kill the guest if it still runs and give everything back; idempotent.

        Waits to the end even when the task is cancelled meanwhile, and raises that afterwards. A
        new microVM cannot be started any more; a start() under way in another task fails.
        """
        if self._state is State.STOPPED:
            return
        if self._state is State.NEW:
            self._state = State.STOPPED
            self._events.close()
            return
        self._belong("close")
        if self._life is None and self._started is not None:
            self._close_asked = True
            await uninterrupted(_settled(self._started))
        if self._life is not None:
            self._end(ExitReason(ExitKind.KILLED, "closed by its owner"))
            await uninterrupted(_settled(self._life))

    def statistics(self) -> MachineStatistics:
        """The counters now, or as they were when the guest ended."""
        if self._last_statistics is not None:
            return self._last_statistics
        machine = self._machine_for("statistics", ended=self._state is State.STOPPING)
        return machine.statistics(self._state.value, self._start_s)

    async def _build(self) -> Machine:
        if self.isolation is None:
            return await build(self.config, self._stack, self._reports())
        from avmm.machine.isolation.remote import build_isolated  # most have none

        return await build_isolated(self.config, self._stack, self._reports())

    async def _stop(self, ask: Callable[[], Awaitable[None]], grace_s: float | None) -> ExitReason:
        if self._ended is not None and not self._ended.done():
            if self._state is State.PAUSED or self._turning.locked():
                await self.resume()
            grace = self.config.stop_grace_s if grace_s is None else grace_s
            self._stop_asked = True
            self._events.publish(StopRequested(self._events.now(), grace))
            await ask()
            await asyncio.wait([self._ended], timeout=grace)
            self._end(ExitReason(ExitKind.KILLED, f"no poweroff within {grace:g} s of the request"))
        return await self.wait()

    def _agent(self, call: str) -> Agent:
        if not self.config.agent:
            raise self._no_agent(call)
        self._machine_for(call)
        if self._guest_agent is None:
            from avmm.agent.client import Agent

            self._guest_agent = Agent(functools.partial(self.vsock.connect, AGENT_PORT))
            # The first to go, before the device its connections are on.
            self._stack.push_async_callback(self._guest_agent.closed)
        return self._guest_agent

    async def _go_on(self, machine: Machine) -> None:
        await machine.resume(lambda: self._state in (State.RUNNING, State.PAUSED))
        if self._state is State.PAUSED:
            self._state = State.RUNNING
            self._events.publish(Resumed(self._events.now()))

    async def _give_up(self) -> None:
        """What was made by start() and will not be used."""
        if self._life is not None:
            self._end(ExitReason(ExitKind.KILLED, "its start was cancelled"))
            self._life.cancel()
            await asyncio.wait([self._life])
            if self._life.cancelled():
                self._life = None
        try:
            await self._stack.aclose()
        finally:
            if self._life is None:
                self._machine = None
            self._state = State.STOPPED
            self._events.close()

    async def _live(self, machine: Machine, alive: asyncio.Future[None]) -> ExitReason:
        """From the first guest instruction to the last resource given back."""
        assert self._ended is not None
        self._state = State.RUNNING
        machine.go()
        self._events.publish(Started(self._events.now()))
        if not alive.done():
            alive.set_result(None)
        try:
            reason = await asyncio.shield(self._ended)
        except asyncio.CancelledError:
            # asyncio.run() cancels every task at its end: a microVM nobody closed ends here.
            self._end(ExitReason(ExitKind.KILLED, "its event loop ended"))
            reason = self._ended.result()
        self.console.end_reason = self.serial.end_reason = str(reason)
        state, self._state = self._state, State.STOPPING
        try:
            await uninterrupted(self._take_down(machine, state))
        finally:
            self._state = State.STOPPED
            self._events.publish(Ended(self._events.now(), reason))
            self._events.close()
        log.debug("microVM ended: %s", reason)
        return reason

    async def _take_down(self, machine: Machine, state: State) -> None:
        try:
            await machine.finish()
            self._last_statistics = machine.statistics(state.value, self._start_s)
        finally:
            await self._stack.aclose()

    def _end(self, reason: ExitReason) -> None:
        """Loop: the first reason counts."""
        if self._ended is None or self._ended.done():
            return
        if self._stop_asked and reason.kind is ExitKind.POWEROFF:
            reason = ExitReason(ExitKind.STOPPED, "the guest powered off when asked to")
        self._ended.set_result(reason)
        if self._machine is not None:
            self._machine.stop()

    def _reports(self) -> Reports:
        events = self._events

        def on_fault(id: str, fault: GuestFault) -> None:
            events.publish(DeviceFault(events.now(), id, fault.kind, str(fault)))

        def on_ready(id: str, ready: bool) -> None:
            events.publish((DriverReady if ready else DriverGone)(events.now(), id))

        def on_link(id: str, up: bool) -> None:
            events.publish(LinkChanged(events.now(), id, up))

        def on_console_closed() -> None:
            events.publish(ConsoleClosed(events.now()))

        return Reports(self._end, on_fault, on_ready, on_link, on_console_closed)

    def _belong(self, call: str) -> None:
        """Raises ConfigError("loop") unless this is the microVM's loop, or at least its thread."""
        try:
            running: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        here = threading.get_ident()
        if self._loop is None:
            if running is None:
                raise ConfigError("loop", f"{call}: no event loop runs here; call it from a task")
            self._loop, self._thread = running, here
        if self._thread != here or running not in (self._loop, None):
            raise ConfigError(
                "loop",
                f"{call}: this microVM belongs to another event loop; from elsewhere use "
                "asyncio.run_coroutine_threadsafe() or loop.call_soon_threadsafe()",
            )

    def _machine_for(self, call: str, *, ended: bool = False) -> Machine:
        alive = self._state in (State.RUNNING, State.PAUSED)
        if self._machine is None or not (alive or ended):
            raise ConfigError("state", f"{call}: {self._described()}")
        if self._state is not State.STOPPED:
            self._belong(call)
        return self._machine

    def _described(self) -> str:
        never = self._state is State.STOPPED and self._life is None
        return f"this microVM is {self._state.value}{' and never ran' if never else ''}"


async def _settled(future: asyncio.Future[Any]) -> None:
    await asyncio.wait([future])
