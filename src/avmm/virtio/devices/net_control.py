"""The commands of the network device's control queue (virtio 1.3 section 5.1.6.5), parsed."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar

from avmm.virtio import features

ACK_OK = b"\x00"
ACK_ERROR = b"\x01"
DATA_MAX_BYTES = 64 * 1024
"""Far beyond any command a driver can mean: two MAC tables of five thousand entries each."""

VLANS = 4096
_MAC_BYTES = 6


class RxFlag(enum.IntEnum):
    """The commands of the class VIRTIO_NET_CTRL_RX: what is received, or not (5.1.6.5.1)."""

    PROMISC = 0
    ALLMULTI = 1
    ALLUNI = 2
    NOMULTI = 3
    NOUNI = 4
    NOBCAST = 5


@dataclass(frozen=True, slots=True)
class RxMode:
    """Switch one of the flags."""

    flag: RxFlag
    on: bool

    @property
    def feature(self) -> int:
        """The feature bit that allows it; every command has one."""
        basic = self.flag in (RxFlag.PROMISC, RxFlag.ALLMULTI)
        return features.NET_CTRL_RX if basic else features.NET_CTRL_RX_EXTRA


@dataclass(frozen=True, slots=True)
class MacTable:
    """Receive for these addresses too (5.1.6.5.2)."""

    unicast: tuple[bytes, ...]
    multicast: tuple[bytes, ...]
    feature: ClassVar[int] = features.NET_CTRL_RX


@dataclass(frozen=True, slots=True)
class MacAddress:
    """The guest's own address."""

    mac: bytes
    feature: ClassVar[int] = features.NET_CTRL_MAC_ADDR


@dataclass(frozen=True, slots=True)
class Vlan:
    """Receive frames of that network, or no longer (5.1.6.5.3)."""

    number: int
    add: bool
    feature: ClassVar[int] = features.NET_CTRL_VLAN


@dataclass(frozen=True, slots=True)
class AnnounceAck:
    """The driver has told the network where it is (5.1.6.5.4)."""

    feature: ClassVar[int] = features.NET_GUEST_ANNOUNCE


@dataclass(frozen=True, slots=True)
class PairsInUse:
    """How many queue pairs the driver uses (5.1.6.5.6)."""

    count: int
    feature: ClassVar[int] = features.NET_MQ


@dataclass(frozen=True, slots=True)
class GuestOffloads:
    """The offloads that the driver can take now, as feature bits (5.1.6.5.8)."""

    bits: int
    feature: ClassVar[int] = features.NET_CTRL_GUEST_OFFLOADS


Command = RxMode | MacTable | MacAddress | Vlan | AnnounceAck | PairsInUse | GuestOffloads

_RX, _MAC, _VLAN, _ANNOUNCE, _MQ, _GUEST_OFFLOADS = range(6)
_MAC_TABLE_SET, _MAC_ADDR_SET = 0, 1
_VLAN_ADD, _VLAN_DEL = 0, 1


def parse(data: bytes) -> Command | None:
    """The command in a chain's data, its class first; None when it is none: unknown, too short,
    too long, or with values that mean nothing."""
    if len(data) < 2:
        return None
    kind, command, rest = data[0], data[1], data[2:]
    if kind == _RX:
        return _parse_rx(command, rest)
    if kind == _MAC:
        return _parse_mac(command, rest)
    if kind == _VLAN and command in (_VLAN_ADD, _VLAN_DEL) and len(rest) == 2:
        number = int.from_bytes(rest, "little")
        return Vlan(number, command == _VLAN_ADD) if number < VLANS else None
    if command != 0:
        return None
    if kind == _ANNOUNCE and not rest:
        return AnnounceAck()
    if kind == _MQ and len(rest) == 2:
        return PairsInUse(int.from_bytes(rest, "little"))
    if kind == _GUEST_OFFLOADS and len(rest) == 8:
        return GuestOffloads(int.from_bytes(rest, "little"))
    return None


def _parse_rx(command: int, rest: bytes) -> RxMode | None:
    if command >= len(RxFlag) or len(rest) != 1:
        return None
    return RxMode(RxFlag(command), bool(rest[0]))


def _parse_mac(command: int, rest: bytes) -> MacTable | MacAddress | None:
    if command == _MAC_ADDR_SET:
        unicast = len(rest) == _MAC_BYTES and not rest[0] & 1 and any(rest)
        return MacAddress(rest) if unicast else None
    if command != _MAC_TABLE_SET:
        return None
    tables: list[tuple[bytes, ...]] = []
    for _ in range(2):
        count = int.from_bytes(rest[:4], "little")
        end = 4 + count * _MAC_BYTES
        if len(rest) < end:
            return None
        tables.append(tuple(rest[at : at + _MAC_BYTES] for at in range(4, end, _MAC_BYTES)))
        rest = rest[end:]
    return None if rest else MacTable(*tables)
