"""Commands of a NIC's driver on the control queue (virtio 1.3 section 5.1.6.5), and the frames that
its filters tell apart."""

from __future__ import annotations

import struct

from avmm.virtio.devices.net_control import RxFlag

MAC = bytes.fromhex("525400000001")
OTHER = bytes.fromhex("525400000002")
GROUP = bytes.fromhex("01005e000001")
BROADCAST = b"\xff" * 6

ANNOUNCE_ACK = bytes([3, 0])
PROMISC_OFF = bytes([0, RxFlag.PROMISC, 0])


def rx_mode(flag: RxFlag, on: int) -> bytes:
    return bytes([0, flag, on])


def mac_address(mac: bytes) -> bytes:
    return bytes([1, 1]) + mac


def mac_table(unicast: list[bytes], multicast: list[bytes]) -> bytes:
    tables = [struct.pack("<I", len(table)) + b"".join(table) for table in (unicast, multicast)]
    return bytes([1, 0]) + b"".join(tables)


def offloads(bits: int) -> bytes:
    return bytes([5, 0]) + struct.pack("<Q", bits)


def use_pairs(count: int) -> bytes:
    return bytes([4, 0]) + struct.pack("<H", count)


def vlan(number: int, *, add: bool = True) -> bytes:
    return bytes([2, 0 if add else 1]) + struct.pack("<H", number)


def frame(to: bytes, *, vlan: int | None = None) -> bytes:
    tag = b"" if vlan is None else b"\x81\x00" + struct.pack(">H", vlan)
    return to + OTHER + tag + b"\x08\x00" + bytes(46)
