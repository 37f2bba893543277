"""Ethernet frames: made, and checked by plain arithmetic."""

from __future__ import annotations

import struct

A, B, C = (bytes([2, 0, 0, 0, 0, n]) for n in (1, 2, 3))
BROADCAST = b"\xff" * 6

CSUM, TSO4, TSO6, ECN = 1, 2, 4, 8
"""What a receiver takes."""

FIN, PSH, ACK, CWR = 0x01, 0x08, 0x10, 0x80

VNET = struct.Struct("<BBHHHHH")
GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_ECN = 0, 1, 4, 0x80


def frame(to: bytes = B, sender: bytes = A, payload: bytes = b"hello") -> bytes:
    """One of a private protocol."""
    return to + sender + b"\x88\xb5" + payload


def total(data: bytes) -> int:
    """The Internet checksum's sum (RFC 1071); 0xFFFF where a checksum in it is right."""
    if len(data) % 2:
        data += b"\0"
    value = sum(struct.unpack(f">{len(data) // 2}H", data))
    while value >> 16:
        value = (value & 0xFFFF) + (value >> 16)
    return value


def pseudo(version: int, ip: bytes, length: int, protocol: int = 6) -> bytes:
    """The pseudo header of what follows an IP header."""
    if version == 4:
        return ip[12:20] + struct.pack(">BBH", 0, protocol, length)
    return ip[8:40] + struct.pack(">IHBB", length, 0, 0, protocol)


def ip_header(version: int, length: int, protocol: int = 6, identification: int = 7) -> bytes:
    """Of a packet with `length` bytes behind it."""
    if version == 6:
        return struct.pack(">IHBB", 0x60000000, length, protocol, 64) + bytes(15) + b"\1" * 17
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + length, identification, 0x4000, 64, protocol, 0)
    head += bytes([10, 0, 0, 1, 10, 0, 0, 2])
    return head[:10] + struct.pack(">H", total(head) ^ 0xFFFF) + head[12:]


def tcp_frame(
    payload: bytes,
    *,
    version: int = 4,
    flags: int = ACK | PSH,
    sequence: int = 1000,
    identification: int = 7,
    options: bytes = b"\1" * 12,
    tags: int = 0,
    complete: bool = False,
) -> bytes:
    """A TCP frame; without `complete`, with the pseudo header's sum in the checksum's place."""
    tcp_bytes = 20 + len(options)
    ip = ip_header(version, tcp_bytes + len(payload), identification=identification)
    tcp = struct.pack(">HHIIBBHHH", 80, 81, sequence, 5, tcp_bytes // 4 << 4, flags, 500, 0, 0)
    tcp += options
    covered = pseudo(version, ip, tcp_bytes + len(payload))
    value = total(covered + tcp + payload) ^ 0xFFFF if complete else total(covered)
    tcp = tcp[:16] + struct.pack(">H", value) + tcp[18:]
    kind = b"\x08\x00" if version == 4 else b"\x86\xdd"
    return B + A + b"\x81\x00\x00\x07" * tags + kind + ip + tcp + payload


def tcp_offset(version: int, tags: int = 0) -> int:
    """Where the TCP header begins."""
    return 14 + 4 * tags + (20 if version == 4 else 40)


def vnet(
    *,
    flags: int = 1,
    gso: int = GSO_NONE,
    segment_bytes: int = 0,
    start: int = 34,
    offset: int = 16,
    header_bytes: int = 0,
) -> bytes:
    """A struct virtio_net_hdr_v1."""
    return VNET.pack(flags, gso, header_bytes, segment_bytes, start, offset, 0)
