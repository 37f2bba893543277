"""Queue pairs served by the kernel's vhost-net: packets never come to this process."""

from __future__ import annotations

import errno
import functools
import os
import select
from collections.abc import Sequence

from avmm.errors import ConfigError, GuestFault, HostError
from avmm.eventfd import owned_eventfd
from avmm.hostnet.vhost import NO_FD, VhostNet, VhostRing
from avmm.native import ffi, lib
from avmm.virtio import features
from avmm.virtio.device import VirtioDevice
from avmm.virtio.devices.net_filter import ReceiveFilter
from avmm.virtio.devices.net_pairs import HostLink
from avmm.virtio.home import HomeChoice, Lane
from avmm.virtio.limit import RateLimit
from avmm.virtio.queue import Queue

_RING_FEATURES = features.transport("packed") | features.IN_ORDER | features.NET_MRG_RXBUF
"""What concerns whoever serves the rings; the rest is between driver, device and TAP."""

_FILTERS = features.NET_CTRL_RX | features.NET_CTRL_RX_EXTRA | features.NET_CTRL_VLAN
"""The kernel passes on all that comes."""


class VhostPairs:
    """One /dev/vhost-net, and so one kernel thread, a pair. On PCI the kernel raises the queues'
    own vectors; on virtio-mmio a lane adds the status bit."""

    def __init__(
        self, device: VirtioDevice, tap: HostLink, queues: Sequence[Queue], choice: HomeChoice
    ) -> None:
        self._device = device
        self._tap = tap
        self._queues = tuple(queues)
        self._vhosts: list[VhostNet] = []
        self._running: set[int] = set()
        self._active: tuple[bool, ...] | None = None
        self._link_up = True
        self._error = 0
        stack = device.context.stack
        memory = device.context.memory
        table = [(r.gpa, r.size_bytes, r.hva) for r in memory.regions]
        for _ in tap.fds:
            vhost = VhostNet()
            stack.callback(vhost.close)
            vhost.set_memory(table)
            self._vhosts.append(vhost)
        self.withheld = (_RING_FEATURES & ~self._vhosts[0].features) | _FILTERS
        self._error_fd = owned_eventfd(device.context.stack)
        self._gone = select.epoll()
        stack.callback(self._gone.close)
        self._gone.register(tap.fds[0], 0)  # errors only: nobody here reads packets
        self._relay: Lane | None = None
        self._relay_fd = NO_FD
        if device.interrupts.line is not None:
            self._add_relay(choice)
        else:
            for index, queue in enumerate(self._queues):
                queue.interrupt.on_fd_change.append(functools.partial(self._set_call, index))

    def activate(self, negotiated: int, mtu: int) -> None:
        """The rings' features; the kernel takes the packets' own from the TAP."""
        for vhost in self._vhosts:
            vhost.set_features(negotiated & _RING_FEATURES & vhost.features)

    def set_offload(self, flags: int) -> None:
        """Nothing: see activate()."""

    def resume(self, active: Sequence[bool]) -> None:
        """Hand the rings of these pairs to the kernel."""
        self._active = tuple(active)
        pump = self._device.pump
        pump.watch(self._error_fd, self._ring_broken)
        if self._relay is not None:
            self._relay.start()
        if not self._link_up:
            return
        pump.watch(self._gone.fileno(), self._tap_gone)
        for index, queue in enumerate(self._queues):
            if self._active[index // 2] and queue.ready:
                self._start(index, queue)

    def hold(self) -> None:
        """Take all rings back, and note where they stand."""
        self._active = None
        self._device.pump.unwatch(self._error_fd)
        self._device.pump.unwatch(self._gone.fileno())
        for index in sorted(self._running):
            self._stop(index)

    def forget(self, pair: int) -> None:
        """Nothing: the kernel has given back what it did not use."""

    def set_link(self, up: bool) -> None:
        """Without a cable the rings rest."""
        self._link_up = up
        if (active := self._active) is not None:
            self.hold()
            self.resume(active)

    def set_filter(self, wanted: ReceiveFilter, mac: bytes) -> None:
        """Nothing: filters are not offered."""

    def set_limits(self, rx: RateLimit | None, tx: RateLimit | None) -> None:
        """None: the kernel knows no such thing."""
        if rx is not None or tx is not None:
            raise ConfigError("limit", f"Net {self._tap.name}: vhost=on has no rate limits")

    def take_error(self) -> int:
        """What became of the TAP."""
        error, self._error = self._error, 0
        return error

    def counters(self) -> dict[str, int]:
        """None: the kernel counts on the TAP."""
        return {}

    def _start(self, index: int, queue: Queue) -> None:
        memory = self._device.context.memory
        size = queue.size
        ring = VhostRing(
            size=size,
            desc_hva=memory.hva(queue.desc_gpa, 16 * size),
            driver_hva=memory.hva(queue.driver_gpa, 6 + 2 * size),
            device_hva=memory.hva(queue.device_gpa, 6 + 8 * size),
            base=queue.base,
            kick_fd=queue.kick_fd,
            call_fd=queue.interrupt.fd if self._relay is None else self._relay_fd,
            error_fd=self._error_fd,
        )
        self._running.add(index)
        self._vhosts[index // 2].start(index % 2, ring, self._tap.fds[index // 2])

    def _stop(self, index: int) -> None:
        self._running.remove(index)
        base = self._vhosts[index // 2].stop(index % 2)
        queue = self._queues[index]
        queue.stop()
        queue.start(self._device.state.features, base)

    def _set_call(self, index: int, fd: int) -> None:
        if index in self._running:
            self._vhosts[index // 2].set_call(index % 2, fd)

    def _ring_broken(self) -> bool:
        os.eventfd_read(self._error_fd)
        raise GuestFault("vhost", "The kernel's vhost-net found a ring broken")

    def _tap_gone(self) -> bool:
        self._error = errno.EBADFD
        self._device.on_news()
        return False

    def _add_relay(self, choice: HomeChoice) -> None:
        device = self._device
        home = device.context.homes.pick(choice)
        self._relay_fd = owned_eventfd(device.context.stack)
        error = ffi.new("int *")
        interrupt = device.interrupts.config.native
        native = lib.av_relay_create(home.native, self._relay_fd, interrupt, error)
        if not native:
            raise HostError("memory", op="Interrupt relay", errno=error[0])
        device.context.stack.callback(lib.av_relay_destroy, native)
        self._relay = device.add_lane(lib.av_relay_lane(native), home, (), "Interrupt relay")
