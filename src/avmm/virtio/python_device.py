"""Virtio devices that users write in Python: PythonDevice, and what drives one."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Collection, Sequence
from typing import ClassVar

from avmm.errors import ConfigError, GuestFault
from avmm.units import KIB
from avmm.virtio import chain as chains
from avmm.virtio.device import VirtioDevice
from avmm.virtio.devtype import DeviceContext, DeviceType
from avmm.virtio.home import HomeChoice
from avmm.virtio.queue import SIZE_MAX, SIZE_MIN
from avmm.virtio.workers import Workers

VIRTIO_ID_MAX = 63
"""What virtio-pci has device numbers for."""

QUEUES_MAX = 64
CONFIG_MAX_BYTES = 0x1000 - 0x100
"""What virtio-mmio has room for behind its registers."""

OWN_FEATURES = (1 << 24) - 1 | ((1 << 64) - (1 << 50))
"""Bits that belong to the kind of device (virtio 1.3 section 2.2)."""


class Chain:
    """One buffer that the driver has offered: bytes for the device, room for its answer.

    queue: its index. data: a copy of all that the driver wrote, in order, however it was cut into
    descriptors. room_bytes: for an answer, in all.
    """

    __slots__ = ("_answer", "_taken", "data", "queue", "room_bytes")

    def __init__(self, queue: int, taken: chains.Chain, data: bytes) -> None:
        self.queue = queue
        self.data = data
        self.room_bytes = taken.room_bytes
        self._taken = taken
        self._answer = bytearray()

    @property
    def written(self) -> int:
        """Bytes of the answer so far."""
        return len(self._answer)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Add to the answer, which the driver sees when handle() has returned.

        Raises ValueError when there is no room for it.
        """
        if len(self._answer) + len(data) > self.room_bytes:
            raise ValueError(
                f"{len(self._answer)} bytes are written, {len(data)} more do not fit into the "
                f"{self.room_bytes} that the driver has room for"
            )
        self._answer += data


class PythonDevice:
    """Base of a virtio device written in Python; attach one by Config(devices=[...]).

        class Adder(avmm.PythonDevice):
            virtio_id = 50

            async def handle(self, chain: avmm.Chain) -> None:
                chain.write(sum(chain.data).to_bytes(4, "little"))

    handle() runs on the user's own loop, once for each chain that the driver offers, many at a
    time, up to the size of each queue; when it returns, the driver gets the chain back with what
    was written, in any order. What else happens:

    - It raises: the driver gets the chain back with 0 bytes written, it is counted ("failed") and
      logged, and the device goes on. GuestFault says that the driver broke the device's protocol:
      then the device stops and asks for a reset besides (DEVICE_NEEDS_RESET).
    - It hangs: only its own chain waits. A reset by the driver, or the machine's end, cancels it;
      a coroutine that does not end within 5 seconds of that is given up, with an error in the log.
    - The machine pauses: that waits for every handle() under way. Queues of `event_queues` are
      apart: the driver offers their chains for what the device may have to tell some day, so
      their handle() is cancelled, and begins anew with the same chain when the machine goes on.

    The attributes, of the class or set in __init__(), are read when the machine is made. An object
    belongs to one machine at a time. All methods are called on the loop.

    virtio_id: virtio 1.3 chapter 5; 50 to 63 are nobody's yet.
    queues: how many chains each queue holds at most, a power of two.
    event_queues: indices of those that wait for the device.
    features: bits of this kind of device, 0 to 23 and 50 to 63; the rest is avmm's.
    config: the configuration space at first; set_config() changes it.
    data_max_bytes: chains with more for the device come back with 0 bytes written ("refused").
    name: begins the device's id, in logs and statistics; by default the class' in lower case.
    id: all of it. pci_class: base class, subclass and interface.
    """

    virtio_id: int = 0
    queues: Sequence[int] = (64,)
    event_queues: Collection[int] = ()
    features: int = 0
    config: bytes = b""
    data_max_bytes: int = 64 * KIB
    name: str | None = None
    id: str | None = None
    pci_class: int = 0xFF_0000

    home: ClassVar[HomeChoice] = "loop"

    _driven: ServedDevice | None = None

    async def handle(self, chain: Chain) -> None:
        """Do what the driver asks for, and write the answer."""
        raise NotImplementedError

    def activated(self, features: int) -> None:
        """The driver is ready; features: what it has agreed to."""

    def was_reset(self) -> None:
        """The driver starts afresh, or is gone: forget what it set up. Nothing is in flight."""

    def config_written(self, offset: int, data: bytes) -> None:
        """The driver wrote its configuration space; nothing changes in it by itself."""

    def counters(self) -> dict[str, int]:
        """What vm.statistics() is to tell besides."""
        return {}

    def set_config(self, data: bytes) -> None:
        """Replace the configuration space, and tell the driver."""
        self.config = data
        if self._driven is not None:
            self._driven.set_config(data)

    # What follows is for the machine.

    @property
    def device_type(self) -> DeviceType:
        """What the machine is told of this device."""
        return DeviceType(
            name=self.name or type(self).__name__.lower(),
            virtio_id=self.virtio_id,
            flag="",
            summary=(type(self).__doc__ or "").partition("\n")[0],
            build=build,
            pci_class=self.pci_class,
        )


def check_device(device: PythonDevice, what: str) -> None:
    """Raises ConfigError("device") unless `device` can be attached; `what` begins its message."""
    what = f"{what}: {type(device).__name__}"
    for problem in _problems(device):
        raise ConfigError("device", f"{what}.{problem}")


def _problems(device: PythonDevice) -> Sequence[str]:
    found = []
    virtio_id = device.virtio_id
    if not isinstance(virtio_id, int) or not 1 <= virtio_id <= VIRTIO_ID_MAX:
        found.append(f"virtio_id: {virtio_id} is not in 1 to {VIRTIO_ID_MAX}")
    if not 1 <= len(device.queues) <= QUEUES_MAX:
        found.append(f"queues: {len(device.queues)} is not in 1 to {QUEUES_MAX}")
    for index, size in enumerate(device.queues):
        if not isinstance(size, int) or not SIZE_MIN <= size <= SIZE_MAX or size & (size - 1):
            found.append(
                f"queues[{index}]: {size!r} is not a power of two from {SIZE_MIN} to {SIZE_MAX}"
            )
    for index in device.event_queues:
        if not 0 <= index < len(device.queues):
            found.append(f"event_queues: there is no queue {index}")
    if device.features & ~OWN_FEATURES:
        found.append(f"features: {device.features & ~OWN_FEATURES:#x} is not for devices to offer")
    if not isinstance(device.config, bytes) or len(device.config) > CONFIG_MAX_BYTES:
        found.append(f"config: it has to be bytes, {CONFIG_MAX_BYTES} at most")
    if not inspect.iscoroutinefunction(device.handle):
        found.append("handle: it has to be a coroutine function (async def)")
    return found


class ServedDevice(VirtioDevice):
    """A PythonDevice as its machine sees it."""

    def __init__(self, device: PythonDevice, context: DeviceContext) -> None:
        sizes = tuple(device.queues)
        super().__init__(device.device_type, context, offered=device.features, queue_sizes=sizes)
        self.device = device
        self._failed = 0
        self._refused = 0
        self._event_queues = frozenset(device.event_queues)
        limit = device.data_max_bytes
        self._chains = [chains.ChainQueue(queue, data_max_bytes=limit) for queue in self.queues]
        self._in_flight: list[set[Chain]] = [set() for _ in sizes]
        self._kept: list[Chain] = []  # of event queues, to begin anew
        self._cancelling = False
        self._resting = False
        self._dirty: set[int] = set()
        self._flush: asyncio.Handle | None = None
        name = f"avmm-{context.id}"
        work = context.loop, name, self._perform, context.guest_log
        self._requests: Workers[Chain] = Workers(*work)
        self._events: Workers[Chain] = Workers(*work)
        self.set_config(device.config)

    def kick(self, index: int) -> bool:
        """Take chains, as long as no more than the queue holds are in flight."""
        in_flight = self._in_flight[index]
        limit = self.queues[index].size - len(in_flight)
        if limit <= 0:
            self.queues[index].take_kick()
            return False
        found: list[Chain] = []
        count = 0
        try:
            for taken in self._chains[index].take(limit):
                count += 1
                if taken.data is None:
                    self._refused += 1
                    self._give_back(index, taken, b"")
                else:
                    found.append(Chain(index, taken, taken.data))
        finally:
            in_flight.update(found)
            self._workers(index).put(found)
        # With as many in flight as the queue holds, the end of one goes on.
        return count == limit and len(in_flight) < self.queues[index].size

    def on_activate(self, negotiated: int) -> None:
        """Tell the author."""
        self.device.activated(negotiated)

    def on_resume(self) -> None:
        """Chains that waited for an event wait again."""
        self._cancelling = self._resting = False
        kept, self._kept = self._kept, []
        self._events.put(kept)

    async def on_cancel(self) -> None:
        """Every handle() under way is cancelled."""
        self._cancelling = True
        await self._requests.cancel(self._finish_empty)
        await self._events.cancel(self._finish_empty)

    async def on_rest(self) -> None:
        """Answers are waited for, events are not."""
        await self._requests.rest()
        self._resting = True
        await self._events.cancel(self._keep)
        self._flush_now()

    def on_queue_stop(self, index: int) -> None:
        """What is kept of it is the driver's again."""
        self._in_flight[index].clear()
        self._dirty.discard(index)
        self._kept = [chain for chain in self._kept if chain.queue != index]

    def on_reset(self) -> None:
        """Tell the author."""
        self.device.was_reset()

    def on_config_write(self, offset: int, data: bytes) -> None:
        """Tell the author."""
        self.device.config_written(offset, data)

    def counters(self) -> dict[str, int]:
        """failed: calls of handle() that raised; refused: chains that were too long."""
        return {"failed": self._failed, "refused": self._refused, **self.device.counters()}

    def _workers(self, index: int) -> Workers[Chain]:
        return self._events if index in self._event_queues else self._requests

    async def _perform(self, chain: Chain) -> None:
        """One chain; whatever happens, it is given back once, or kept."""
        workers = self._workers(chain.queue)
        answer = b""
        try:
            await self.device.handle(chain)
            answer = bytes(chain._answer)
        except asyncio.CancelledError as e:
            if workers.abandoned:
                pass  # it was given back, or kept, already
            elif self._cancelling:
                self._finish(chain, b"")
            elif self._resting and workers is self._events:
                self._keep(chain)
            else:  # by something that handle() has waited for
                self._count_failure(chain, e)
                self._finish(chain, b"")
            raise
        except GuestFault as e:
            self.fault(e)
        except Exception as e:
            self._count_failure(chain, e)
        if not workers.abandoned:
            self._finish(chain, answer)

    def _keep(self, chain: Chain) -> None:
        """For another handle() after the rest."""
        chain._answer.clear()
        self._kept.append(chain)

    def _finish_empty(self, chain: Chain) -> None:
        self._finish(chain, b"")

    def _finish(self, chain: Chain, answer: bytes) -> None:
        index = chain.queue
        in_flight = self._in_flight[index]
        if chain not in in_flight:  # given up, or the queue is gone
            return
        was_full = len(in_flight) == self.queues[index].size
        in_flight.remove(chain)
        self._give_back(index, chain._taken, answer)
        if was_full:
            self.queues[index].notify()

    def _give_back(self, index: int, taken: chains.Chain, answer: bytes) -> None:
        """The driver learns of it soon, with what else is ready by then."""
        self._chains[index].give_back(taken, answer)
        self._dirty.add(index)
        if self._flush is None:
            self._flush = self.context.loop.call_soon(self._flush_now)

    def _flush_now(self) -> None:
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
        while self._dirty:
            self._chains[self._dirty.pop()].flush()

    def _count_failure(self, chain: Chain, error: BaseException) -> None:
        self._failed += 1
        self.say(
            *(logging.WARNING, "handle() of a chain of queue %d: %s: %s (failure %d)"),
            *(chain.queue, type(error).__name__, error, self._failed),
            error=error,
        )


async def build(device: PythonDevice, context: DeviceContext) -> ServedDevice:
    """What drives `device`. Raises ConfigError("device") when it has a machine already."""
    check_device(device, context.id)
    if device._driven is not None:
        raise ConfigError(
            "device", f"{context.id}: this object is another machine's device already"
        )
    served = ServedDevice(device, context)
    device._driven = served

    def release() -> None:
        device._driven = None

    context.stack.callback(release)
    return served
