"""Feature bits (virtio 1.3 chapter 6 and the devices' own sections), as masks."""

from __future__ import annotations

from typing import Final, Literal

RING_INDIRECT_DESC: Final = 1 << 28
RING_EVENT_IDX: Final = 1 << 29
VERSION_1: Final = 1 << 32
RING_PACKED: Final = 1 << 34
IN_ORDER: Final = 1 << 35

_TRANSPORT: Final = RING_INDIRECT_DESC | RING_EVENT_IDX | VERSION_1

RingLayout = Literal["packed", "split"]
RING_DEFAULT: Final[RingLayout] = "packed"


def transport(ring: RingLayout) -> int:
    """What every device of avmm offers: packed rings, of which a driver may still choose split
    ones, or only those."""
    return _TRANSPORT | (RING_PACKED if ring == "packed" else 0)


# Block device, 5.2.3.
BLK_SIZE_MAX: Final = 1 << 1
BLK_SEG_MAX: Final = 1 << 2
BLK_RO: Final = 1 << 5
BLK_BLK_SIZE: Final = 1 << 6
BLK_FLUSH: Final = 1 << 9
BLK_TOPOLOGY: Final = 1 << 10
BLK_CONFIG_WCE: Final = 1 << 11
BLK_MQ: Final = 1 << 12
BLK_DISCARD: Final = 1 << 13
BLK_WRITE_ZEROES: Final = 1 << 14

# Network device, 5.1.3.
NET_CSUM: Final = 1 << 0
NET_GUEST_CSUM: Final = 1 << 1
NET_CTRL_GUEST_OFFLOADS: Final = 1 << 2
NET_MTU: Final = 1 << 3
NET_MAC: Final = 1 << 5
NET_GUEST_TSO4: Final = 1 << 7
NET_GUEST_TSO6: Final = 1 << 8
NET_GUEST_ECN: Final = 1 << 9
NET_HOST_TSO4: Final = 1 << 11
NET_HOST_TSO6: Final = 1 << 12
NET_HOST_ECN: Final = 1 << 13
NET_MRG_RXBUF: Final = 1 << 15
NET_STATUS: Final = 1 << 16
NET_CTRL_VQ: Final = 1 << 17
NET_CTRL_RX: Final = 1 << 18
NET_CTRL_VLAN: Final = 1 << 19
NET_CTRL_RX_EXTRA: Final = 1 << 20
NET_GUEST_ANNOUNCE: Final = 1 << 21
NET_MQ: Final = 1 << 22
NET_CTRL_MAC_ADDR: Final = 1 << 23
NET_GUEST_USO4: Final = 1 << 54
NET_GUEST_USO6: Final = 1 << 55
NET_HOST_USO: Final = 1 << 56
NET_GUEST_TSO: Final = NET_GUEST_TSO4 | NET_GUEST_TSO6
NET_GUEST_USO: Final = NET_GUEST_USO4 | NET_GUEST_USO6

# Console device, 5.3.3.
CONSOLE_SIZE: Final = 1 << 0
CONSOLE_MULTIPORT: Final = 1 << 1
CONSOLE_EMERG_WRITE: Final = 1 << 2
