"""What serves a network device's queue pairs: here our own datapath, one lane a pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from avmm.errors import HostError
from avmm.native import CData, ffi, lib
from avmm.virtio import features
from avmm.virtio.device import VirtioDevice
from avmm.virtio.devices.net_filter import ReceiveFilter
from avmm.virtio.home import HomeChoice, Lane
from avmm.virtio.limit import Limiter, RateLimit, attach
from avmm.virtio.queue import Queue

_ETHERNET_BYTES = 14 + 4
_LARGE_BYTES = 64 * 1024 + _ETHERNET_BYTES

COUNTERS = (
    *("rx_packets", "rx_bytes", "rx_dropped", "rx_filtered", "rx_copied"),
    *("tx_packets", "tx_bytes", "tx_dropped"),
    *("rx_throttled", "tx_throttled"),
)


class HostLink(Protocol):
    """What a network device is plugged into: a TAP, or a cable in memory. Loop."""

    name: str
    fds: list[int]
    """One for each queue pair."""
    end: CData
    """The cable's; NULL: packets are read and written by `fds`."""
    mtu: int
    uso: bool
    """Whether it knows UDP segmentation offload."""

    def set_offload(self, flags: int) -> None:
        """OFFLOAD_* of `hostnet.tap` that the driver takes."""
        ...

    def set_queues(self, attached: Sequence[bool]) -> None:
        """Which of `fds` may get packets."""
        ...

    def set_carrier(self, up: bool) -> None:
        """Whether the other end sees a carrier."""
        ...

    def set_driver(self, present: bool) -> None:
        """Whether there is a driver to take packets."""
        ...


class Pairs(Protocol):
    """All pairs of a device; pair i are its queues 2i (receive) and 2i+1 (transmit). Loop."""

    withheld: int
    """Features that the device must not offer with this datapath."""

    def activate(self, negotiated: int, mtu: int) -> None:
        """The driver is ready: adapt to its features. mtu: what it was told, 0: nothing."""
        ...

    def set_offload(self, flags: int) -> None:
        """OFFLOAD_* of `hostnet.tap` that the driver takes."""
        ...

    def resume(self, active: Sequence[bool]) -> None:
        """Let these pairs work."""
        ...

    def hold(self) -> None:
        """Let none work; what is under way is at its end when this returns."""
        ...

    def forget(self, pair: int) -> None:
        """Forget receive buffers that were taken and not used."""
        ...

    def set_link(self, up: bool) -> None:
        """Whether the cable is in."""
        ...

    def set_filter(self, wanted: ReceiveFilter, mac: bytes) -> None:
        """Receive only what the driver wants."""
        ...

    def set_limits(self, rx: RateLimit | None, tx: RateLimit | None) -> None:
        """How much all pairs may receive and send. Raises ConfigError("limit"), HostError."""
        ...

    def take_error(self) -> int:
        """The errno with which the TAP failed since the last call, or 0."""
        ...

    def counters(self) -> dict[str, int]:
        """Sums over all pairs."""
        ...


class NativePairs:
    """Each pair is a native lane on a home of its own choice, over one of the TAP's queues."""

    withheld = 0

    def __init__(
        self, device: VirtioDevice, tap: HostLink, queues: Sequence[Queue], choice: HomeChoice
    ) -> None:
        self._tap = tap
        self._rx_limiter = Limiter(device.context.stack, f"Net {tap.name}")
        self._tx_limiter = Limiter(device.context.stack, f"Net {tap.name}")
        self._natives: list[CData] = []
        self._lanes: list[Lane] = []
        for fd, rx, tx in zip(tap.fds, queues[::2], queues[1::2], strict=True):
            home = device.context.homes.pick(choice)
            error = ffi.new("int *")
            native = lib.av_net_create(home.native, fd, tap.end, rx.ring, tx.ring, error)
            if not native:
                raise HostError("memory", op=f"Net {tap.name}", errno=error[0])
            device.context.stack.callback(self._destroy, native)
            self._natives.append(native)
            lane = device.add_lane(lib.av_net_lane(native), home, (rx, tx), tap.name)
            self._lanes.append(lane)

    def activate(self, negotiated: int, mtu: int) -> None:
        """Whether receive buffers are merged, and how large frames are."""
        mergeable = bool(negotiated & features.NET_MRG_RXBUF)
        large = negotiated & (features.NET_GUEST_TSO | features.NET_GUEST_USO)
        frame_max = _LARGE_BYTES if large else self._tap.mtu + _ETHERNET_BYTES
        for native in self._natives:
            lib.av_net_start(native, mergeable, frame_max, mtu)

    def set_offload(self, flags: int) -> None:
        """Of what comes by a TAP, some may be older than this."""
        for native in self._natives:
            lib.av_net_set_offloads(native, flags)

    def resume(self, active: Sequence[bool]) -> None:
        """The device starts the lanes that are enabled."""
        for lane, enabled in zip(self._lanes, active, strict=True):
            lane.enabled = enabled

    def hold(self) -> None:
        """Nothing: the device holds its lanes."""

    def forget(self, pair: int) -> None:
        """They belong to the driver again."""
        lib.av_net_stop(self._natives[pair])

    def set_link(self, up: bool) -> None:
        """Each looks at the TAP again."""
        for native in self._natives:
            lib.av_net_set_link(native, up)

    def set_filter(self, wanted: ReceiveFilter, mac: bytes) -> None:
        """The same for each pair."""
        for native in self._natives:
            lib.av_net_set_filter(native, wanted.native(mac))

    def set_limits(self, rx: RateLimit | None, tx: RateLimit | None) -> None:
        """Each pair obeys the same two."""
        if rx is not None or tx is not None:
            limiters = self._rx_limiter.native, self._tx_limiter.native
            attach(self._natives, lambda net: lib.av_net_limit(net, *limiters), self._tap.name)
        self._rx_limiter.set(rx)
        self._tx_limiter.set(tx)

    def take_error(self) -> int:
        """That of one of them."""
        errors = [int(lib.av_net_take_error(native)) for native in self._natives]
        return max(errors, default=0)

    def counters(self) -> dict[str, int]:
        """Packets and bytes both ways, what was dropped, and waits for the limits."""
        stats = ffi.new("struct av_net_stats *")
        total = dict.fromkeys(COUNTERS, 0)
        for native in self._natives:
            lib.av_net_statistics(native, stats)
            for name in COUNTERS:
                total[name] += int(getattr(stats, name))
        return total

    def _destroy(self, native: CData) -> None:
        self._natives.remove(native)
        lib.av_net_destroy(native)
