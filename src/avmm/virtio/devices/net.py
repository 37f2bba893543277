"""virtio-net: a NIC on a TAP of the host (virtio 1.3 section 5.1)."""

from __future__ import annotations

import logging
import os
import struct
from typing import Annotated, ClassVar

import msgspec

from avmm.errors import HostError
from avmm.hostnet import tap as host_tap
from avmm.hostnet.names import check_guest, check_interface_name, check_mtu, parse_host, parse_mac
from avmm.hostnet.tap import HostTap, TapSettings, open_tap
from avmm.native import ffi, lib
from avmm.virtio import features
from avmm.virtio.device import VirtioDevice
from avmm.virtio.devtype import DeviceContext, DeviceType
from avmm.virtio.home import HomeChoice

log = logging.getLogger(__name__)

RX, TX = 0, 1
QUEUE_SIZE = 256
_S_LINK_UP = 1

# struct virtio_net_config up to mtu (5.1.4).
_CONFIG = struct.Struct("<6sHHH")

_HOST_OFFLOADS = (
    features.NET_CSUM | features.NET_HOST_TSO4 | features.NET_HOST_TSO6 | features.NET_HOST_ECN
)
_TUN_OFFLOADS = {
    features.NET_GUEST_CSUM: host_tap.OFFLOAD_CSUM,
    features.NET_GUEST_TSO4: host_tap.OFFLOAD_TSO4,
    features.NET_GUEST_TSO6: host_tap.OFFLOAD_TSO6,
    features.NET_GUEST_ECN: host_tap.OFFLOAD_TSO_ECN,
}
_GUEST_OFFLOADS = sum(_TUN_OFFLOADS)


class Tap(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
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
    home: HomeChoice = "auto"
    id: Annotated[str | None, msgspec.Meta(description="name in logs and statistics")] = None

    device_type: ClassVar[DeviceType]

    def __post_init__(self) -> None:
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


class NetDevice(VirtioDevice):
    """One NIC. Owns the native datapath; the TAP belongs to the context's stack."""

    def __init__(self, config: Tap, tap: HostTap, context: DeviceContext) -> None:
        offered = features.NET_MAC | features.NET_STATUS | features.NET_MRG_RXBUF
        offered |= _HOST_OFFLOADS | _GUEST_OFFLOADS
        if config.mtu is not None:
            offered |= features.NET_MTU
        super().__init__(NET, context, offered=offered, queue_sizes=(QUEUE_SIZE, QUEUE_SIZE))
        self.tap = tap
        self.mac = parse_mac(config.mac, f"Net {tap.name}") if config.mac else _random_mac()
        self._mtu = config.mtu
        self._link_up = True
        home = context.homes.pick(config.home)
        rx, tx = self.queues
        error = ffi.new("int *")
        self._native = lib.av_net_create(home.native, tap.fd, rx.ring, tx.ring, error)
        if not self._native:
            raise HostError("memory", op=f"Net {tap.name}", errno=error[0])
        context.stack.callback(self._destroy)
        self.add_lane(lib.av_net_lane(self._native), home, self.queues, f"TAP {tap.name}")
        self.set_config(self._config())

    def on_activate(self, negotiated: int) -> None:
        """Let the host use what the guest can take."""
        flags = sum(flag for bit, flag in _TUN_OFFLOADS.items() if negotiated & bit)
        self.tap.set_offload(flags)
        lib.av_net_start(self._native, bool(negotiated & features.NET_MRG_RXBUF))

    def on_queue_stop(self, index: int) -> None:
        """Receive buffers that were taken and not filled belong to the driver again."""
        if index == RX:
            lib.av_net_stop(self._native)

    def on_news(self) -> None:
        """Somebody took the TAP away: the guest loses its carrier, not its life."""
        if error := lib.av_net_take_error(self._native):
            log.error("%s: TAP %s: %s", self.context.id, self.tap.name, os.strerror(error))
            self._set_link_up(False)

    @property
    def link_up(self) -> bool:
        """Whether the cable is in."""
        return self._link_up

    def set_link(self, up: bool) -> None:
        """Plug the cable in or out, at both ends: the driver sees it at once (S_LINK_UP), and so
        does the host's interface. Raises HostError."""
        self.tap.set_carrier(up)
        self._set_link_up(up)

    def _set_link_up(self, up: bool) -> None:
        if up == self._link_up:
            return
        self._link_up = up
        lib.av_net_set_link(self._native, up)
        self.set_config(self._config())

    def counters(self) -> dict[str, int]:
        """Packets and bytes both ways, and what was dropped."""
        stats = ffi.new("struct av_net_stats *")
        lib.av_net_statistics(self._native, stats)
        return {name: int(getattr(stats, name)) for name in _COUNTERS}

    def _config(self) -> bytes:
        status = _S_LINK_UP if self._link_up else 0
        return _CONFIG.pack(self.mac, status, 1, self._mtu or 0)

    def _destroy(self) -> None:
        lib.av_net_destroy(self._native)
        self._native = ffi.NULL


_COUNTERS = (
    *("rx_packets", "rx_bytes", "rx_dropped", "rx_copied"),
    *("tx_packets", "tx_bytes", "tx_dropped"),
)


def _random_mac() -> bytes:
    """Locally administered, unicast."""
    return bytes([0x02]) + os.urandom(5)


async def build(config: Tap, context: DeviceContext) -> NetDevice:
    """Open the TAP, then make the device. Raises ConfigError, HostError."""
    tap = await open_tap(TapSettings(config.name, config.host, config.mtu))
    context.stack.push_async_callback(tap.close)
    return NetDevice(config, tap, context)


NET = DeviceType(
    name="net",
    virtio_id=1,
    flag="--net",
    summary="a NIC on a TAP, with checksum and segmentation offloads and mergeable buffers",
    build=build,
    pci_class=0x02_0000,
)
Tap.device_type = NET
