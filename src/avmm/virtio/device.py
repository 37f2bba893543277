"""What every virtio device has: features, queues, a configuration space, a life."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec

from avmm.errors import BugError, GuestFault, HostError
from avmm.frozen import FrozenDict
from avmm.kicks import Kicks
from avmm.native import CData
from avmm.virtio import features
from avmm.virtio.devtype import DeviceContext, DeviceType
from avmm.virtio.home import Home, Lane
from avmm.virtio.pump import Pump
from avmm.virtio.queue import NO_FAULT, Queue, QueueStatistics
from avmm.virtio.state import DeviceState, Transition

log = logging.getLogger(__name__)

_COUNTERS_MAX: Final = 256
"""Of a device in a worker, see MachineStatistics."""


@dataclass(frozen=True, slots=True)
class DeviceStatistics:
    """Counters since the device was made.

    status: the status field now. faults: times the guest broke the specification; last_fault:
    how. ignored: register accesses that mean nothing.
    """

    type: str
    status: int
    faults: int
    last_fault: str | None
    ignored: int
    interrupts: int
    queues: tuple[QueueStatistics, ...]
    counters: Annotated[Mapping[str, int], msgspec.Meta(max_length=_COUNTERS_MAX)]


@dataclass(frozen=True, slots=True)
class ConfigSpace:
    """The configuration space and its generation (virtio 1.3 section 2.5), replaced as one: a
    driver on another thread that has read a new byte must not read the old generation after it."""

    data: bytes = b""
    generation: int = 0


class Hooks:
    """What an author may add to a device. All on the loop; the default is to do nothing."""

    def on_features(self, negotiated: int) -> None:
        """The features are fixed (FEATURES_OK): what the configuration says may depend on them."""

    def on_activate(self, negotiated: int) -> None:
        """The driver is ready and the queues it uses are started; adapt to its features."""

    def on_resume(self) -> None:
        """Work begins, after on_activate() or a rest: watch descriptors of your own."""

    def on_hold(self) -> None:
        """Undo on_resume(); called again and again."""

    async def on_cancel(self) -> None:
        """Nobody wants the answers any more: bring to an end what Python has in flight, after
        on_hold(). Called again and again."""

    async def on_rest(self) -> None:
        """Wait until Python has nothing in flight, after on_hold()."""

    def on_queue_stop(self, index: int) -> None:
        """Forget chains taken from a queue and not given back; the driver has them again."""

    def on_reset(self) -> None:
        """Forget what the driver set up; at rest, after every on_queue_stop()."""

    def is_kicked(self, index: int) -> bool:
        """Whether kick() works on queue `index`, which no enabled lane serves."""
        return True

    def kick(self, index: int) -> bool:
        """Work on a queue whose kick_fd is readable: drain it, do a bounded amount. True when
        there is more to do. Raises GuestFault or HostError."""
        raise BugError("device", f"queue {index} has neither a lane nor a kick()")

    def on_news(self) -> None:
        """A native lane has something to tell."""

    def on_config_write(self, offset: int, data: bytes) -> None:
        """The driver wrote its configuration space; nothing is writable by default."""

    def counters(self) -> dict[str, int]:
        """The device's own counters, for statistics()."""
        return {}


class VirtioDevice(Hooks):
    """Base of all devices. Queues are served by native lanes, which an author adds when the device
    is made, or by its kick(). The rest is what is needed of Hooks.

    All methods on the loop, but for what the transport reads on vCPU threads: `config` and
    `state`. Calls that change what the device does exclude each other, so vCPUs that reset and
    start a device at the same moment do it one after the other.
    """

    def __init__(
        self,
        device_type: DeviceType,
        context: DeviceContext,
        *,
        offered: int,
        queue_sizes: tuple[int, ...],
    ) -> None:
        self.device_type = device_type
        self.context = context
        self.interrupts = context.interrupts
        self.state = DeviceState(offered | features.transport(context.ring))
        self.config = ConfigSpace()
        self.ignored = 0
        self.pump = Pump(context.loop, self._on_error)
        self._kicks = Kicks()
        self._chains_at_kick: dict[int, int] = {}
        self.queues: list[Queue] = []
        self._lanes: list[Lane] = []
        self._faults = 0
        self._last_fault: str | None = None
        self._quiesced = False
        self._control = asyncio.Lock()
        for index, size in enumerate(queue_sizes):
            queue = Queue(index, size, context.memory, context.interrupts.queue(index))
            context.stack.callback(queue.close)
            self.queues.append(queue)

    def add_lane(self, native: CData, home: Home, queues: Sequence[Queue], op: str) -> Lane:
        """Let a native lane serve these queues. op: begins the message of its HostError."""

        def on_failure(result: int) -> None:
            self._on_error(self.failure(result, op))

        lane = Lane(native, home, queues, on_failure, self._tell_news)
        self.context.stack.callback(lane.close)
        self._lanes.append(lane)
        return lane

    def _tell_news(self) -> None:
        with self._contained():
            self.on_news()

    async def set_status(self, value: int) -> None:
        """The driver wrote the status field; returns when all that follows from it is done."""
        async with self._control:
            with self._contained():
                before = self.state.features
                transition = self.state.write(value)
                if not before and self.state.features:
                    self.on_features(self.state.features)
                if transition is Transition.RESET:
                    was_ready = self.state.driver_ok
                    await self._reset()
                    if was_ready:
                        self.context.on_ready(self.context.id, False)
                elif transition is Transition.ACTIVATE:
                    self._activate()
                    self.context.on_ready(self.context.id, True)

    async def set_queue_ready(self, queue: Queue, ready: bool, base: int | None = None) -> None:
        """The driver offers a queue, or takes it away (virtio 1.3 section 4.2.2, QueueReady).

        base: where the ring begins, as Queue.start() has it; once the driver is set up.
        """
        async with self._control:
            with self._contained():
                if ready != queue.ready:
                    await self._turn_queue(queue, ready, base)

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver wrote its configuration space."""
        with self._contained():
            self.on_config_write(offset, data)

    async def quiesce(self) -> None:
        """The one way to bring the device to rest: nothing is in flight when it returns, and no
        chain is taken before resume(). Idempotent."""
        async with self._control:
            self._quiesced = True
            await self._rest()

    async def resume(self) -> None:
        """Undo quiesce(). Idempotent."""
        async with self._control:
            if self._quiesced:
                self._quiesced = False
                self._work()

    async def end(self) -> None:
        """quiesce() for good: what Python has in flight is cancelled, not waited for."""
        # Not under the lock at first: who holds it may be waiting for just that.
        self._hold()
        await self.on_cancel()
        async with self._control:
            self._quiesced = True
            self._hold()
            await self.on_cancel()
            await self._rest()

    async def reset(self) -> None:
        """Back to the state after power-on; returns when the driver may reuse its memory."""
        async with self._control:
            await self._reset()

    def fault(self, fault: GuestFault) -> None:
        """The guest broke the specification: count it and ask for a reset (2.1.2)."""
        self._faults += 1
        self._last_fault = fault.kind
        self.say(logging.WARNING, "%s (fault %d)", fault, self._faults)
        self._need_reset()
        self.context.on_fault(self.context.id, fault)

    def say(
        self, level: int, message: str, *args: object, error: BaseException | None = None
    ) -> None:
        """A line in the log that the guest can cause. error: its traceback follows."""
        self.context.guest_log.write(
            log, level, f"%s: {message}", self.context.id, *args, error=error
        )

    def set_config(self, data: bytes, *, notify: bool = True) -> None:
        """Replace the configuration space and, by `notify`, tell the driver (2.5.1)."""
        self.config = ConfigSpace(data, (self.config.generation + 1) & 0xFFFF_FFFF)
        if notify and self.state.driver_ok:
            self.interrupts.config.raise_config()

    def failure(self, result: int, op: str) -> GuestFault | HostError:
        """What to raise for a native call's negative result: -EPROTO is the guest's doing."""
        if result == -errno.EPROTO:
            for queue in self.queues:
                if (kind := queue.fault) != NO_FAULT:
                    return GuestFault(kind, f"Queue {queue.index}: {kind}")
            return GuestFault("ring", f"{op}: a ring was broken, and set up again since")
        return HostError(self.device_type.name, op=op, errno=-result)

    def statistics(self) -> DeviceStatistics:
        """Counters as of now."""
        return DeviceStatistics(
            type=self.device_type.name,
            status=self.state.status,
            faults=self._faults,
            last_fault=self._last_fault,
            ignored=self.ignored,
            interrupts=self.interrupts.count,
            queues=tuple(queue.statistics() for queue in self.queues),
            counters=FrozenDict(self.counters()),
        )

    def _activate(self) -> None:
        if not self.state.live:
            # It broke while it was set up. Now the driver can be told (2.1.2).
            self.interrupts.config.raise_config()
            return
        for queue in self.queues:
            if queue.ready:
                queue.start(self.state.features)
        self.on_activate(self.state.features)
        self._work()

    def _work(self) -> None:
        """Start working, unless somebody wants the device at rest."""
        if self._quiesced or not self.state.live:
            return
        self.on_resume()
        served: set[Queue] = set()
        for lane in self._lanes:
            if not lane.enabled:
                continue
            served.update(lane.queues)
            if any(queue.ready for queue in lane.queues):
                lane.start()
        for queue in self.queues:
            if queue.ready and queue not in served and self.is_kicked(queue.index):
                self.pump.watch(queue.kick_fd, functools.partial(self._kicked, queue))
                # The driver may have offered chains while its kicks were switched off.
                queue.notify()

    def _kicked(self, queue: Queue) -> bool:
        """A queue that Python serves was kicked: for a reason, if chains have been taken off it
        since the last time, which may be later than a kick."""
        more = self.kick(queue.index)
        chains = queue.statistics().chains
        rest_s = self._kicks.judge(chains != self._chains_at_kick.get(queue.index, 0))
        self._chains_at_kick[queue.index] = chains
        if rest_s:
            self.pump.rest(queue.kick_fd, rest_s)
        return more

    def _hold(self) -> None:
        """Take no more chains."""
        self.pump.stop()
        self.on_hold()
        for lane in self._lanes:
            lane.hold()

    async def _rest(self) -> None:
        self._hold()
        for lane in self._lanes:
            await lane.rest()
        await self.on_rest()

    async def _reset(self) -> None:
        self._hold()
        await self.on_cancel()
        await self._rest()
        for queue in self.queues:
            self._stop_queue(queue)
            queue.forget()
        self.on_reset()
        self.interrupts.acknowledge(0xFFFF_FFFF)
        self.state.reset()

    async def _turn_queue(self, queue: Queue, ready: bool, base: int | None) -> None:
        """One queue starts or stops; the others rest meanwhile and go on where they were."""
        if self.state.driver_ok:
            await self._rest()
        if ready:
            queue.start(self.state.features, base)
        else:
            self._stop_queue(queue)
        queue.ready = ready
        self._work()

    def _stop_queue(self, queue: Queue) -> None:
        self.on_queue_stop(queue.index)
        queue.stop()

    def _need_reset(self) -> None:
        self._hold()
        if self.state.needs_reset() and self.state.driver_ok:
            self.interrupts.config.raise_config()

    @contextlib.contextmanager
    def _contained(self) -> Iterator[None]:
        """Nothing the guest asks for may fail in the hands of whoever carries it out."""
        try:
            yield
        except Exception as e:
            self._on_error(e)

    def _on_error(self, error: Exception) -> None:
        if isinstance(error, GuestFault):
            self.fault(error)
            return
        self._need_reset()
        if not isinstance(error, HostError):
            bug = BugError("device", f"{self.context.id}: {type(error).__name__}: {error}")
            bug.__cause__ = error
            error = bug
        self.say(logging.ERROR, "%s", error, error=error)
        self.context.on_error(error)
