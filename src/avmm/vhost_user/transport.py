"""The vhost-user transport: what a front-end sets up, applied to a device."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Sequence

from avmm.errors import GuestFault
from avmm.vhost_user import message
from avmm.vhost_user.inflight import Inflight
from avmm.vhost_user.memory import FrontEndMemory
from avmm.vhost_user.message import (
    F_PROTOCOL_FEATURES,
    InflightMemory,
    MemoryTable,
    VringAddresses,
)
from avmm.vhost_user.profile import profile_of
from avmm.vhost_user.vring import Vring
from avmm.virtio import features
from avmm.virtio.device import VirtioDevice
from avmm.virtio.interrupt import NO_FD
from avmm.virtio.state import (
    ACKNOWLEDGE,
    DEVICE_NEEDS_RESET,
    DRIVER,
    DRIVER_OK,
    FEATURES_OK,
)

_FEATURES_OK = ACKNOWLEDGE | DRIVER | FEATURES_OK


class VhostUserTransport:
    """One front-end's hold on a device, as virtio-mmio's registers are a guest's. Loop.

    A ring runs while it is enabled and has a descriptor for kicks. Whatever changes under a
    running ring (memory, addresses, that descriptor) stops it first: nothing is in flight then,
    and it goes on where it stood.

    All raise GuestFault("front-end") for what cannot be.
    """

    def __init__(self, device: VirtioDevice, memory: FrontEndMemory) -> None:
        self.device = device
        self.memory = memory
        self.profile = profile_of(device.device_type)
        rings = len(device.queues) - self.profile.own_rings
        self.vrings = [Vring(queue) for queue in device.queues[:rings]]
        self._features = 0
        self._inflight: Inflight | None = None
        self._requests: socket.socket | None = None

    @property
    def offered(self) -> int:
        """Feature bits, the protocol's own among them."""
        return self.device.state.offered & ~self.profile.hidden | F_PROTOCOL_FEATURES

    @property
    def queue_number(self) -> int:
        """How many queues there are, as front-ends count them."""
        return len(self.vrings) // self.profile.rings_a_queue

    def vring(self, index: int) -> Vring:
        """The ring of that index."""
        if index >= len(self.vrings):
            raise GuestFault("front-end", f"Ring {index}: there are {len(self.vrings)}")
        return self.vrings[index]

    def stopped_vring(self, index: int) -> Vring:
        """The same, for changes that no running ring allows."""
        vring = self.vring(index)
        if vring.queue.ready:
            raise GuestFault("front-end", f"Ring {index} is set up while it runs")
        return vring

    async def set_features(self, value: int) -> None:
        """The driver's features, with which the next ring starts."""
        if value & ~self.offered:
            raise GuestFault("front-end", f"Features {value:#x}; offered are {self.offered:#x}")
        accepted = value & ~F_PROTOCOL_FEATURES
        if accepted != self._features:
            if any(vring.queue.ready for vring in self.vrings):
                raise GuestFault("front-end", "Features are changed while rings run")
            await self.device.reset()
            self._features = accepted
        if not value & F_PROTOCOL_FEATURES:
            await self._change(self.vrings, _enable)

    async def set_memory(self, table: MemoryTable, fds: Sequence[int]) -> None:
        """Other memory, under rings that may be running."""
        await self._change(self.vrings, lambda _: None, lambda: self.memory.replace(table, fds))

    @property
    def keeps_inflight(self) -> bool:
        """Whether its rings can keep what is in flight in memory of the front-end's."""
        return not self._features & features.RING_PACKED

    def set_inflight(self, where: InflightMemory, fd: int) -> None:
        """Where the rings that are started next keep what is in flight; `fd` stays the caller's."""
        if any(vring.queue.ready for vring in self.vrings):
            raise GuestFault("front-end", "Memory for what is in flight comes while rings run")
        inflight = Inflight(self.memory, where, fd)
        self._forget_inflight()
        self._inflight = inflight

    async def set_addresses(self, addresses: VringAddresses) -> None:
        """Where a ring is; front-ends say it again while it runs."""
        vring = self.vring(addresses.index)
        if vring.addresses != addresses:

            def change(vring: Vring) -> None:
                vring.addresses = addresses

            await self._change([vring], change)

    async def set_kick(self, vring: Vring, fds: list[int]) -> None:
        """The descriptor for a ring's kicks, taken over: it starts an enabled ring. None stops
        the ring."""
        await self._change([vring], lambda vring: vring.set_kick(fds.pop() if fds else NO_FD))

    async def set_enabled(self, vring: Vring, enabled: bool) -> None:
        """Let a ring run, or keep it from running."""
        if vring.enabled != enabled:

            def change(vring: Vring) -> None:
                vring.enabled = enabled

            await self._change([vring], change)

    async def stop(self, vring: Vring) -> int:
        """Stop a ring, which a new descriptor for kicks starts again; where it stands."""
        await self.set_kick(vring, [])
        return vring.base or 0

    async def reset(self) -> None:
        """Back to the state after power-on, with all rings disabled."""
        await self.device.reset()
        for vring in self.vrings:
            vring.enabled = False
            vring.base = None

    async def end(self) -> None:
        """Bring the device to rest and let go of all that the front-end lent. Idempotent."""
        await self.device.reset()
        for vring in self.vrings:
            vring.close()
        self._forget_inflight()
        self._close_requests()
        self.memory.close()

    def set_requests(self, fd: int) -> None:
        """The socket for our own requests, taken over."""
        self._close_requests()
        self._requests = socket.socket(fileno=fd)
        self._requests.setblocking(False)

    def tell_news(self) -> None:
        """Tell the front-end that its guest has broken the rings, or that the device's
        configuration has changed."""
        if self.device.state.status & DEVICE_NEEDS_RESET:
            for vring in self.vrings:
                vring.signal_error()
        elif self._requests is not None:
            # Full: it has the same request before it. Closed: it does not want to know.
            with contextlib.suppress(BlockingIOError, ConnectionError):
                self._requests.send(message.config_change())

    async def _change(
        self,
        vrings: Sequence[Vring],
        change: Callable[[Vring], None],
        between: Callable[[], None] = lambda: None,
    ) -> None:
        """Apply a change to rings while they are stopped; those that may run do so afterwards."""
        device = self.device
        await device.quiesce()
        try:
            for vring in vrings:
                if vring.queue.ready:
                    await device.set_queue_ready(vring.queue, False)
                    vring.base = vring.queue.base
                change(vring)
            between()
            for vring in vrings:
                if vring.wanted:
                    await self._start(vring)
        finally:
            await device.resume()

    def _forget_inflight(self) -> None:
        if self._inflight is not None:
            self._inflight.close()
            self._inflight = None

    def _close_requests(self) -> None:
        if self._requests is not None:
            self._requests.close()
            self._requests = None

    async def _start(self, vring: Vring) -> None:
        await self._activate()
        vring.place(self.memory.gpa_of, self._inflight if self.keeps_inflight else None)
        await self.device.set_queue_ready(vring.queue, True, vring.base)
        if not vring.queue.ready:
            raise GuestFault("front-end", f"Ring {vring.queue.index} cannot be started")

    async def _activate(self) -> None:
        """What a driver does by the status field: a front-end just starts rings."""
        device = self.device
        if not device.state.live and not any(vring.queue.ready for vring in self.vrings):
            await device.reset()  # of a fault, if it had one
        if device.state.driver_ok:
            return
        device.state.accept_features(self._features)
        await device.set_status(_FEATURES_OK)
        if not device.state.status & FEATURES_OK:
            raise GuestFault(
                "front-end",
                f"Features {self._features:#x}: the driver has to be one of virtio 1.x",
            )
        await device.set_status(_FEATURES_OK | DRIVER_OK)


def _enable(vring: Vring) -> None:
    vring.enabled = True
