"""MicroVM: one virtual machine as an asyncio object."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from avmm.errors import ConfigError
from avmm.legacy.serial16550 import SerialStatistics
from avmm.machine.builder import Parts, build
from avmm.machine.config import Config
from avmm.machine.console import Console
from avmm.machine.lifecycle import State, uninterrupted
from avmm.machine.reason import ExitKind, ExitReason
from avmm.machine.vcpu.thread import VcpuStatistics
from avmm.virtio.device import DeviceStatistics
from avmm.virtio.devices.net import NetDevice
from avmm.virtio.home import HomeStatistics

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MachineStatistics:
    """Counters of one microVM, frozen at the moment of the call.

    start_s: seconds from start() to the first guest instruction; 0 before.
    devices: by device id, each device's own record. homes: the loop's, then the I/O threads'.
    """

    state: str
    start_s: float
    vcpus: tuple[VcpuStatistics, ...]
    console: SerialStatistics
    devices: dict[str, DeviceStatistics]
    homes: tuple[HomeStatistics, ...]


class MicroVM:
    """A microVM. All methods belong to the task's loop that start() ran on.

    `async with MicroVM(config) as vm:` starts it and, on every way out, stops it and gives back
    whatever it held: descriptors, threads, memory, TAPs.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self._state = State.NEW
        self._parts: Parts | None = None
        self._stack = AsyncExitStack()
        self._ended: asyncio.Future[ExitReason] | None = None
        self._life: asyncio.Task[ExitReason] | None = None
        self._last_statistics: MachineStatistics | None = None
        self._start_s = 0.0
        self._stop_asked = False

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
        """Where in its life the microVM is."""
        return self._state

    @property
    def console(self) -> Console:
        """The serial console; also after the guest ended, for what it printed."""
        return self._running_parts("console", ended=True).console

    async def start(self) -> None:
        """Build the machine and let the guest run; once per object.

        Raises ConfigError or HostError; whatever was made by then is gone when it does.
        """
        if self._state is not State.NEW:
            raise ConfigError("state", f"start: this microVM is {self._state.value}, not new")
        self._state = State.STARTING
        began = time.perf_counter()
        loop = asyncio.get_running_loop()
        self._ended = loop.create_future()
        try:
            self._parts = await build(self.config, self._stack, self._end)
        except BaseException:
            self._state = State.STOPPED
            await uninterrupted(self._stack.aclose())
            raise
        self._life = loop.create_task(self._live(), name="avmm-microvm")
        self._parts.gate.resume()
        self._state = State.RUNNING
        self._start_s = time.perf_counter() - began
        log.info("microVM runs, %.0f ms after start()", self._start_s * 1000)

    async def wait(self) -> ExitReason:
        """Wait until the guest has ended and all its resources are given back; why it ended."""
        if self._life is None:
            raise ConfigError("state", f"wait: this microVM is {self._state.value}")
        return await asyncio.shield(self._life)

    async def stop(self, grace_s: float | None = None) -> ExitReason:
        """Press the power button and wait; kill the guest after `grace_s` (the config's) seconds.

        The reason is STOPPED when the guest powered off in time, KILLED when it did not.
        """
        parts = self._running_parts("stop", ended=True)
        if self._ended is not None and not self._ended.done():
            if self._state is State.PAUSED:
                await self.resume()
            self._stop_asked = True
            parts.power.press_power_button()
            grace = self.config.stop_grace_s if grace_s is None else grace_s
            await asyncio.wait([self._ended], timeout=grace)
            self._end(ExitReason(ExitKind.KILLED, f"no poweroff within {grace:g} s of the request"))
        return await self.wait()

    async def kill(self) -> ExitReason:
        """End the guest now, as if its power was cut; acknowledged writes are in the files."""
        self._running_parts("kill", ended=True)
        self._end(ExitReason(ExitKind.KILLED, "killed by its owner"))
        return await self.wait()

    async def pause(self) -> None:
        """Return when no vCPU executes guest instructions and no device has work in flight."""
        parts = self._running_parts("pause")
        await parts.gate.pause()
        for device in parts.devices.values():
            await device.quiesce()
        if self._state is State.RUNNING:
            self._state = State.PAUSED

    async def resume(self) -> None:
        """Let a paused guest go on."""
        parts = self._running_parts("resume")
        for device in parts.devices.values():
            await device.resume()
        parts.gate.resume()
        if self._state is State.PAUSED:
            self._state = State.RUNNING

    def set_link(self, id: str, up: bool) -> None:
        """Plug the cable of a NIC in or out, at both ends.

        id: the device's, "net0" for the first NIC without one of its own. Raises ConfigError when
        there is no such NIC, HostError.
        """
        device = self._running_parts("set_link").devices.get(id)
        if not isinstance(device, NetDevice):
            raise ConfigError("device", f"set_link: this microVM has no NIC {id!r}")
        device.set_link(up)

    async def close(self) -> None:
        """Kill the guest if it still runs and give everything back; idempotent."""
        if self._life is not None:
            self._end(ExitReason(ExitKind.KILLED, "closed by its owner"))
            await uninterrupted(self._settled())

    def statistics(self) -> MachineStatistics:
        """The counters now, or as they were at the end."""
        if self._last_statistics is not None:
            return self._last_statistics
        parts = self._running_parts("statistics")
        return MachineStatistics(
            state=self._state.value,
            start_s=self._start_s,
            vcpus=tuple(thread.statistics() for thread in parts.threads),
            console=parts.serial.statistics(),
            devices={name: device.statistics() for name, device in parts.devices.items()},
            homes=parts.homes.statistics(),
        )

    async def _settled(self) -> None:
        assert self._life is not None
        await asyncio.wait([self._life])

    async def _live(self) -> ExitReason:
        """From the first guest instruction to the last resource given back."""
        assert self._ended is not None
        try:
            reason = await asyncio.shield(self._ended)
        except asyncio.CancelledError:
            # asyncio.run() cancels every task at its end: a microVM nobody closed ends here.
            self._end(ExitReason(ExitKind.KILLED, "its event loop ended"))
            reason = self._ended.result()
        self._last_statistics = self.statistics()
        self._state = State.STOPPING
        try:
            await uninterrupted(self._stack.aclose())
        finally:
            self._state = State.STOPPED
        log.debug("microVM ended: %s", reason)
        return reason

    def _end(self, reason: ExitReason) -> None:
        """Loop: the first reason counts."""
        if self._ended is None or self._ended.done():
            return
        if self._stop_asked and reason.kind is ExitKind.POWEROFF:
            reason = ExitReason(ExitKind.STOPPED, "the guest powered off when asked to")
        self._ended.set_result(reason)
        if self._parts is not None:
            self._parts.gate.stop()

    def _running_parts(self, call: str, *, ended: bool = False) -> Parts:
        alive = self._state in (State.RUNNING, State.PAUSED)
        if self._parts is None or not (alive or ended):
            raise ConfigError("state", f"{call}: this microVM is {self._state.value}")
        return self._parts
