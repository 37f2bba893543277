"""virtio-net: a NIC on a TAP of the host (virtio 1.3 section 5.1)."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import struct
from collections.abc import Iterator
from typing import Annotated, ClassVar, Protocol

import msgspec

from avmm.config import Checked
from avmm.errors import ConfigError, GuestFault, HostError
from avmm.hostnet import tap as host_tap
from avmm.hostnet.names import (
    check_guest,
    check_interface_name,
    check_mtu,
    parse_host,
    parse_mac,
    random_mac,
)
from avmm.hostnet.tap import TapSettings
from avmm.virtio import features
from avmm.virtio.chain import ChainQueue
from avmm.virtio.device import VirtioDevice
from avmm.virtio.devices.net_control import (
    ACK_ERROR,
    ACK_OK,
    DATA_MAX_BYTES,
    AnnounceAck,
    Command,
    GuestOffloads,
    MacAddress,
    MacTable,
    PairsInUse,
    RxMode,
    Vlan,
    parse,
)
from avmm.virtio.devices.net_filter import ReceiveFilter
from avmm.virtio.devices.net_pairs import HostLink, NativePairs, Pairs
from avmm.virtio.devices.net_vhost import VhostPairs
from avmm.virtio.devtype import DeviceContext, DeviceType
from avmm.virtio.home import HomeChoice
from avmm.virtio.limit import RateLimit
from avmm.virtio.queue import SIZE_MAX, SIZE_MIN, check_queue_size

RX, TX = 0, 1
CONTROL_QUEUE_SIZE = 64
PAIRS_DEFAULT_MAX = 8
PAIRS_MAX = 64
_S_LINK_UP = 1
_S_ANNOUNCE = 2

# struct virtio_net_config up to mtu (5.1.4).
_CONFIG = struct.Struct("<6sHHH")

_HOST_OFFLOADS = (
    features.NET_CSUM | features.NET_HOST_TSO4 | features.NET_HOST_TSO6 | features.NET_HOST_ECN
)
_GUEST_OFFLOADS = features.NET_GUEST_CSUM | features.NET_GUEST_TSO | features.NET_GUEST_ECN
_TUN_OFFLOADS = {
    features.NET_GUEST_CSUM: host_tap.OFFLOAD_CSUM,
    features.NET_GUEST_TSO4: host_tap.OFFLOAD_TSO4,
    features.NET_GUEST_TSO6: host_tap.OFFLOAD_TSO6,
    features.NET_GUEST_ECN: host_tap.OFFLOAD_TSO_ECN,
    features.NET_GUEST_USO4: host_tap.OFFLOAD_USO4,
    features.NET_GUEST_USO6: host_tap.OFFLOAD_USO6,
}
CONTROL_FEATURES = (
    features.NET_CTRL_VQ
    | features.NET_CTRL_RX
    | features.NET_CTRL_RX_EXTRA
    | features.NET_CTRL_VLAN
    | features.NET_CTRL_MAC_ADDR
    | features.NET_CTRL_GUEST_OFFLOADS
    | features.NET_GUEST_ANNOUNCE
)
"""What the control queue is for."""


class Tap(Checked, frozen=True):
    """A NIC of the guest; the first is eth0."""

    name: Annotated[
        str, msgspec.Meta(description="TAP of the host, made if needed", extra={"option": "tap"})
    ]
    host: Annotated[
        str | None, msgspec.Meta(description="the host's address on it, with its prefix")
    ] = None
    guest: Annotated[
        str | None, msgspec.Meta(description="the guest's IPv4 address, by the kernel's ip=")
    ] = None
    mac: Annotated[str | None, msgspec.Meta(description="the guest's MAC address")] = None
    mtu: Annotated[int | None, msgspec.Meta(description="MTU of both ends")] = None
    queues: Annotated[
        int | None,
        msgspec.Meta(
            description=f"queue pairs, up to {PAIRS_MAX}; by default as many as can work at once: "
            f"one a vCPU and thread that serves them, up to {PAIRS_DEFAULT_MAX}"
        ),
    ] = None
    queue_size: Annotated[
        int,
        msgspec.Meta(
            description=f"packets that a queue holds, a power of two from {SIZE_MIN} to {SIZE_MAX}"
        ),
    ] = 256
    vhost: Annotated[
        bool, msgspec.Meta(description="packets are moved by the kernel's vhost-net")
    ] = False
    home: HomeChoice = "auto"
    id: Annotated[str | None, msgspec.Meta(description="name in logs and statistics")] = None
    rx_limit: Annotated[
        RateLimit | None,
        msgspec.Meta(description="rate limit of what the guest receives", extra={"prefix": "rx_"}),
    ] = None
    tx_limit: Annotated[
        RateLimit | None,
        msgspec.Meta(description="rate limit of what the guest sends", extra={"prefix": "tx_"}),
    ] = None

    device_type: ClassVar[DeviceType]

    def __post_init__(self) -> None:
        super().__post_init__()
        what = f"Net {self.name}"
        check_interface_name(self.name)
        if self.host is not None:
            parse_host(self.host, what)
        if self.guest is not None:
            check_guest(self.guest, self.host, what)
        if self.mac is not None:
            parse_mac(self.mac, what)
        if self.mtu is not None:
            check_mtu(self.mtu, what)
        if self.queues is not None and not 1 <= self.queues <= PAIRS_MAX:
            raise ConfigError("queues", f"{what}: queues={self.queues} is not in 1 to {PAIRS_MAX}")
        check_queue_size(self.queue_size, what)
        if self.vhost and (self.rx_limit or self.tx_limit):
            raise ConfigError(
                "limit", f"{what}: vhost=on has no rate limits; leave one of them out"
            )


class NetConfig(Protocol):
    """What of a NIC's configuration concerns the device itself; see Tap."""

    @property
    def mac(self) -> str | None: ...
    @property
    def mtu(self) -> int | None: ...
    @property
    def queue_size(self) -> int: ...
    @property
    def vhost(self) -> bool: ...
    @property
    def home(self) -> HomeChoice: ...
    @property
    def rx_limit(self) -> RateLimit | None: ...
    @property
    def tx_limit(self) -> RateLimit | None: ...


class NetDevice(VirtioDevice):
    """One NIC. The pairs' datapath belongs to the context's stack, and so does what it is plugged
    into: a TAP, or what stands in its place."""

    def __init__(self, config: NetConfig, tap: HostLink, context: DeviceContext) -> None:
        offered = features.NET_MAC | features.NET_STATUS | features.NET_MRG_RXBUF
        offered |= _HOST_OFFLOADS | _GUEST_OFFLOADS | CONTROL_FEATURES | features.IN_ORDER
        if tap.uso:
            offered |= features.NET_HOST_USO | features.NET_GUEST_USO
        if config.mtu is not None:
            offered |= features.NET_MTU
        self._pairs_max = len(tap.fds)
        if self._pairs_max > 1:
            offered |= features.NET_MQ
        sizes = (config.queue_size,) * (2 * self._pairs_max) + (CONTROL_QUEUE_SIZE,)
        super().__init__(NET, context, offered=offered, queue_sizes=sizes)
        self.tap = tap
        self._own_mac = parse_mac(config.mac or random_mac(), f"Net {tap.name}")
        self.mac = self._own_mac
        self._mtu = config.mtu
        self._link_up = True
        self._announcing = False
        self._pairs_active = self._pairs_max
        self._filter = ReceiveFilter()
        self._commands = ChainQueue(self.queues[-1], data_max_bytes=DATA_MAX_BYTES)
        self._control_commands = 0
        self._control_errors = 0
        served_by = VhostPairs if config.vhost else NativePairs
        self._pairs: Pairs = served_by(self, tap, self.queues[:-1], config.home)
        self.state.offered &= ~self._pairs.withheld
        self.set_limits(rx=config.rx_limit, tx=config.tx_limit)
        self.set_config(self._config())

    def on_activate(self, negotiated: int) -> None:
        """Let the host use what the guest can take."""
        # A driver that cannot say how many pairs it uses, uses those that it sets up.
        self._pairs_active = 1 if negotiated & features.NET_CTRL_VQ else self._pairs_max
        control = 2 * self._pairs_max if negotiated & features.NET_MQ else 2
        self._commands = ChainQueue(self.queues[control], data_max_bytes=DATA_MAX_BYTES)
        self._filter = ReceiveFilter(negotiated)
        self._pairs.set_filter(self._filter, self.mac)
        told_mtu = bool(negotiated & features.NET_MTU)
        self._pairs.activate(negotiated, self._mtu if self._mtu and told_mtu else 0)
        self._set_offload(negotiated)
        self.tap.set_driver(True)

    def on_resume(self) -> None:
        """The pairs that the driver uses get packets, and work."""
        active = [
            pair < self._pairs_active and any(q.ready for q in self.queues[2 * pair : 2 * pair + 2])
            for pair in range(self._pairs_max)
        ]
        with self._outlive_the_tap():
            self.tap.set_queues(active)
        self._pairs.resume(active)

    def on_hold(self) -> None:
        """Nothing is moved by this datapath any more."""
        self._pairs.hold()

    def on_queue_stop(self, index: int) -> None:
        """Receive buffers that were taken and not filled belong to the driver again."""
        if index % 2 == RX and index < 2 * self._pairs_max:
            self._pairs.forget(index // 2)

    def on_reset(self) -> None:
        """What the driver asked for by its control queue is forgotten."""
        self.mac = self._own_mac
        self._announcing = False
        self.set_config(self._config(), notify=False)
        self.tap.set_driver(False)
        with self._outlive_the_tap():
            self.tap.set_queues([True])

    def on_news(self) -> None:
        """A pair cannot read the TAP."""
        if error := self._pairs.take_error():
            self._tap_is_gone(error)

    def is_kicked(self, index: int) -> bool:
        """Only the control queue: pairs not in use may be set up all the same."""
        return index == self._commands.queue.index

    def kick(self, index: int) -> bool:
        """Carry out control commands."""
        for chain in self._commands.take():
            if chain.room_bytes == 0:
                raise GuestFault("request", f"Queue {index}: a command without room for its ack")
            command = parse(chain.data) if chain.data is not None else None
            done = command is not None and self._perform(command)
            self._control_commands += 1
            self._control_errors += not done
            self._commands.answer(chain, ACK_OK if done else ACK_ERROR)
        return False

    @property
    def link_up(self) -> bool:
        """Whether the cable is in."""
        return self._link_up

    def set_link(self, up: bool) -> None:
        """Plug the cable in or out, at both ends: the driver sees it at once (S_LINK_UP), and so
        does the host's interface. Raises HostError."""
        self.tap.set_carrier(up)
        self._set_link_up(up)

    def set_limits(self, *, rx: RateLimit | None, tx: RateLimit | None) -> None:
        """Limit what all pairs receive and send together, from now on. Raises ConfigError("limit"),
        HostError."""
        self._pairs.set_limits(rx, tx)

    def announce(self) -> None:
        """Ask the driver to tell the network where it is (5.1.6.5.4), if it can."""
        if self._can_announce():
            self._announcing = True
            self.set_config(self._config())

    async def resume(self) -> None:
        """Bridges may have forgotten the guest meanwhile."""
        rested = self._quiesced
        await super().resume()
        if rested:
            self.announce()

    def counters(self) -> dict[str, int]:
        """Packets and bytes both ways, what was dropped, and the driver's commands."""
        control = {
            "control_commands": self._control_commands,
            "control_errors": self._control_errors,
        }
        return self._pairs.counters() | control

    def _perform(self, command: Command) -> bool:
        """Do what the driver asks for; False for what it must not ask."""
        if not self.state.features & command.feature:
            return False
        match command:
            case RxMode() | MacTable() | Vlan():
                self._filter.apply(command)
                self._pairs.set_filter(self._filter, self.mac)
            case MacAddress(mac):
                self.mac = mac
                self._pairs.set_filter(self._filter, mac)
                self.set_config(self._config(), notify=False)
            case AnnounceAck():
                self._announcing = False
                self.set_config(self._config(), notify=False)
            case PairsInUse(count):
                return self._use_pairs(count)
            case GuestOffloads(bits):
                return self._use_offloads(bits)
        return True

    def _use_pairs(self, count: int) -> bool:
        if not 1 <= count <= self._pairs_max:
            return False
        self._pairs_active = count
        # Nothing is in flight on their lanes, if maybe an interrupt that they hold back.
        self._hold()
        self._work()
        return True

    def _use_offloads(self, bits: int) -> bool:
        if bits & ~(self.state.features & (_GUEST_OFFLOADS | features.NET_GUEST_USO)):
            return False
        self._set_offload(bits)
        return True

    def _set_offload(self, bits: int) -> None:
        flags = _tun_offloads(bits)
        self._pairs.set_offload(flags)
        with self._outlive_the_tap():
            self.tap.set_offload(flags)

    def _set_link_up(self, up: bool) -> None:
        if up == self._link_up:
            return
        self._link_up = up
        self._pairs.set_link(up)
        self._announcing = self._can_announce()
        self.set_config(self._config())
        self.context.on_link(self.context.id, up)

    def _can_announce(self) -> bool:
        wanted = self.state.features & features.NET_GUEST_ANNOUNCE
        return self._link_up and self.state.live and bool(wanted)

    def _tap_is_gone(self, error: int) -> None:
        """Somebody took the TAP away: the guest loses its carrier, not its life."""
        self.say(logging.ERROR, "TAP %s: %s", self.tap.name, os.strerror(error))
        self._set_link_up(False)

    @contextlib.contextmanager
    def _outlive_the_tap(self) -> Iterator[None]:
        try:
            yield
        except HostError as e:
            if e.errno != errno.EBADFD:  # what all ioctls answer for a TAP that is gone
                raise
            self._tap_is_gone(errno.EBADFD)

    def _config(self) -> bytes:
        status = _S_LINK_UP if self._link_up else 0
        status |= _S_ANNOUNCE if self._announcing else 0
        return _CONFIG.pack(self.mac, status, self._pairs_max, self._mtu or 0)


def _tun_offloads(bits: int) -> int:
    """The TAP's flags for GUEST_* features. Without the feature that one needs (5.1.3.1) it is
    left out, and so is one USO without the other, which TAPs know only together."""
    if not bits & features.NET_GUEST_CSUM:
        return 0
    if not bits & features.NET_GUEST_TSO:
        bits &= ~features.NET_GUEST_ECN
    if bits & features.NET_GUEST_USO != features.NET_GUEST_USO:
        bits &= ~features.NET_GUEST_USO
    return sum(flag for bit, flag in _TUN_OFFLOADS.items() if bits & bit)


def tap_settings(config: Tap, cpus: int, io_threads: int) -> TapSettings:
    """What the TAP of a NIC has to be, in a machine of so many vCPUs and I/O threads."""
    # vhost-net has a thread for each pair.
    threads = PAIRS_DEFAULT_MAX if config.vhost else max(io_threads, 1)
    at_once = min(cpus, threads, PAIRS_DEFAULT_MAX)
    return TapSettings(config.name, config.host, config.mtu, queues=config.queues or at_once)


async def build(config: Tap, context: DeviceContext) -> NetDevice:
    """Open the TAP, then make the device. Raises ConfigError, HostError."""
    tap = await context.open_tap(tap_settings(config, context.cpus, context.homes.threads))
    context.stack.push_async_callback(tap.close)
    if config.queues is not None and len(tap.fds) != config.queues:
        raise ConfigError(
            "queues",
            f"Net {tap.name}: queues={config.queues}, but it was made with one queue; "
            "make it with multi_queue",
        )
    return NetDevice(config, tap, context)


NET = DeviceType(
    name="net",
    virtio_id=1,
    flag="--net",
    summary="a NIC on a TAP: several queue pairs, filters and offloads by the driver's control",
    build=build,
    pci_class=0x02_0000,
)
Tap.device_type = NET
