"""What every virtio device has: features, queues, a configuration space, a life."""

from __future__ import annotations

import errno
import functools
import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass

from avmm.errors import BugError, GuestFault, HostError
from avmm.virtio import features
from avmm.virtio.devtype import DeviceContext, DeviceType
from avmm.virtio.pump import Pump
from avmm.virtio.queue import Queue, QueueStatistics
from avmm.virtio.state import DeviceState

log = logging.getLogger(__name__)

_FAULTS_LOGGED = 10


@dataclass(frozen=True, slots=True)
class DeviceStatistics:
    """Counters since the device was made. faults: times the guest broke the specification."""

    type: str
    faults: int
    interrupts: int
    queues: tuple[QueueStatistics, ...]
    counters: dict[str, int]


class VirtioDevice(ABC):
    """Base of all devices. All methods on the loop, but for config_space, which vCPUs read.

    A device implements kick(), and of the hooks on_activate(), on_quiesce(), on_reset(),
    write_config() and counters() what it needs.

    config_space: the device's configuration as bytes; replaced whole, never changed in place.
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
        self.interrupt = context.interrupt
        self.state = DeviceState(offered | features.TRANSPORT)
        self.config_space = b""
        self.config_generation = 0
        self.pump = Pump(context.loop, self._on_work_error)
        self.queues: list[Queue] = []
        self._faults = 0
        for index, size in enumerate(queue_sizes):
            queue = Queue(index, size, context.memory, context.interrupt)
            context.stack.callback(queue.close)
            self.queues.append(queue)

    @abstractmethod
    def kick(self, index: int) -> bool:
        """Work on queue `index`, whose kick_fd is readable; True when there is more to do."""

    def on_activate(self, negotiated: int) -> None:
        """The driver is ready; queues that it uses are started."""

    async def on_quiesce(self) -> None:
        """Come to rest: take no more chains, and return when none is in flight."""

    async def on_reset(self) -> None:
        """Forget what the driver set up; after quiesce()."""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver wrote its configuration space; nothing is writable unless overridden."""

    def counters(self) -> dict[str, int]:
        """The device's own counters, for statistics()."""
        return {}

    def activate(self) -> None:
        """Start the queues that the driver made ready, and work on them."""
        negotiated = self.state.features
        try:
            for queue in self.queues:
                if queue.ready:
                    queue.start(negotiated)
        except GuestFault as e:
            self.fault(e)
            return
        self.on_activate(negotiated)
        self._watch_queues()

    async def quiesce(self) -> None:
        """The one way to bring the device to rest; idempotent."""
        self.pump.stop()
        await self.on_quiesce()

    async def reset(self) -> None:
        """Back to the state after power-on; returns when the driver may reuse its memory."""
        await self.quiesce()
        await self.on_reset()
        for queue in self.queues:
            queue.stop()
            queue.forget()
        self.interrupt.acknowledge(0xFFFF_FFFF)
        self.state.reset()

    async def disable_queue(self, queue: Queue) -> None:
        """The driver takes one queue away (virtio 1.3 section 4.2.2.2, QueueReady)."""
        queue.ready = False
        if self.state.running:
            await self.quiesce()
            queue.stop()
            self.activate()

    def fault(self, fault: GuestFault) -> None:
        """The guest broke the specification: count it and ask for a reset (2.1.2)."""
        self._faults += 1
        if self._faults <= _FAULTS_LOGGED:
            log.warning("%s: %s", self.context.id, fault)
        self.pump.stop()
        if self.state.needs_reset() and self.state.running:
            self.config_generation += 1
            self.interrupt.raise_config()

    def set_config(self, config_space: bytes) -> None:
        """Replace the configuration space and tell the driver (2.5.1)."""
        self.config_space = config_space
        self.config_generation += 1
        if self.state.running:
            self.interrupt.raise_config()

    def checked(self, result: int, queue: Queue, op: str) -> int:
        """A native call's result; raises GuestFault for -EPROTO, HostError for other errors."""
        if result >= 0:
            return result
        if result == -errno.EPROTO:
            raise GuestFault(queue.fault, f"Queue {queue.index}: {queue.fault}")
        raise HostError(self.device_type.name, op=op, errno=-result)

    def statistics(self) -> DeviceStatistics:
        """Counters as of now."""
        return DeviceStatistics(
            type=self.device_type.name,
            faults=self._faults,
            interrupts=self.interrupt.count,
            queues=tuple(queue.statistics() for queue in self.queues),
            counters=self.counters(),
        )

    def _watch_queues(self) -> None:
        for queue in self.queues:
            if queue.ready:
                self.pump.watch(queue.kick_fd, functools.partial(self.kick, queue.index))

    def _on_work_error(self, error: BaseException) -> None:
        if isinstance(error, GuestFault):
            self.fault(error)
            return
        self.pump.stop()
        if not isinstance(error, HostError):
            bug = BugError("device", f"{self.context.id}: {type(error).__name__}: {error}")
            bug.__cause__ = error
            error = bug
        log.error("%s: %s", self.context.id, error, exc_info=error)
        self.context.on_error(error)
