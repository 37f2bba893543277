"""What a guest leaves to its device is done for a receiver that takes it complete."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avmm.hostnet.cable import FRAME_MAX_BYTES, QUEUE_DEFAULT_BYTES, LinkStatistics, make_cable
from avmm.native import ffi, lib
from fakes import frames
from fakes.frames import (
    ACK,
    CSUM,
    CWR,
    ECN,
    FIN,
    GSO_ECN,
    GSO_TCPV4,
    GSO_TCPV6,
    PSH,
    TSO4,
    TSO6,
    tcp_frame,
    tcp_offset,
    vnet,
)


def send(
    header: bytes, data: bytes, *, takes: int = 0, queue_bytes: int = QUEUE_DEFAULT_BYTES
) -> tuple[list[bytes], LinkStatistics]:
    """What arrives at an end that takes these offloads."""
    one, other = make_cable(queue_bytes)
    one.set_up(True)
    other.set_up(True)
    other.set_offloads(takes)
    lib.av_cable_send(one.native, header, data, ffi.new("uint32_t[1]", [len(data)]), 1)
    room = ffi.new("uint8_t[]", 2 * queue_bytes)
    lengths = ffi.new("uint32_t[]", 4096)
    count = lib.av_cable_take(other.native, room, 2 * queue_bytes, lengths, 4096)
    received, at = [], 0
    for n in range(count):
        received.append(ffi.buffer(room + at, lengths[n])[:])
        at += lengths[n]
    return received, one.statistics()


def large(payload_bytes: int, version: int, tags: int = 0, **options: int) -> tuple[bytes, bytes]:
    """A frame to be segmented into pieces of 1000 bytes, with its header."""
    payload = bytes(n * 7 % 251 for n in range(payload_bytes))
    gso = GSO_TCPV4 if version == 4 else GSO_TCPV6
    header = vnet(gso=gso, segment_bytes=1000, start=tcp_offset(version, tags))
    return header, tcp_frame(payload, version=version, tags=tags, **options)


@pytest.mark.parametrize("takes", [CSUM, CSUM | TSO4 | TSO6 | ECN])
def test_a_frame_goes_as_it_is_to_who_takes_it(takes: int) -> None:
    data = tcp_frame(b"payload")
    assert send(vnet(), data, takes=takes)[0] == [data]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 1000, 1447])
def test_a_checksum_is_filled_in(version: int, size: int) -> None:
    payload = bytes(range(1, 251)) * 6
    (arrived,), statistics = send(
        vnet(start=tcp_offset(version)), tcp_frame(payload[:size], version=version)
    )
    assert arrived == tcp_frame(payload[:size], version=version, complete=True)
    assert statistics.segmented == 0


def test_a_checksum_of_zero_is_sent_as_its_other_form() -> None:
    # All the words under it sum up to 0xFFFF.
    data = frames.frame(payload=bytes(20) + struct.pack(">HH", 0xFFFF, 0))
    (arrived,), _ = send(vnet(start=34, offset=2), data)
    assert arrived[36:38] == b"\xff\xff"


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("tags", [0, 1, 2])
@pytest.mark.parametrize("size", [1, 1000, 1001, 4000, 60_001])
def test_a_large_frame_becomes_ordinary_ones(version: int, tags: int, size: int) -> None:
    header, data = large(size, version, tags, flags=ACK | PSH | FIN | CWR, sequence=2**32 - 1500)
    payload = data[-size:]
    arrived, statistics = send(header, data, takes=CSUM)
    pieces = [payload[at : at + 1000] for at in range(0, size, 1000)]
    expected = []
    for n, piece in enumerate(pieces):
        flags = ACK
        flags |= CWR if n == 0 else 0
        flags |= PSH | FIN if n == len(pieces) - 1 else 0
        expected.append(
            tcp_frame(
                piece,
                version=version,
                tags=tags,
                flags=flags,
                sequence=(2**32 - 1500 + 1000 * n) % 2**32,
                identification=7 + n,
                complete=True,
            )
        )
    assert arrived == expected
    assert statistics.segmented == (size > 1000)


@pytest.mark.parametrize(
    ("gso", "takes", "count"),
    [
        (GSO_TCPV4, CSUM | TSO4, 1),
        (GSO_TCPV4, CSUM | TSO6, 4),
        (GSO_TCPV4, TSO4, 4),
        (GSO_TCPV4 | GSO_ECN, CSUM | TSO4, 4),
        (GSO_TCPV4 | GSO_ECN, CSUM | TSO4 | ECN, 1),
    ],
)
def test_what_is_segmented_depends_on_who_receives(gso: int, takes: int, count: int) -> None:
    _, data = large(4000, 4)
    arrived, _ = send(vnet(gso=gso, segment_bytes=1000), data, takes=takes)
    assert len(arrived) == count


def test_segments_that_can_never_have_room_are_lost_and_counted() -> None:
    extensions = bytes(500)
    plain = tcp_frame(bytes(1000), version=6)
    data = plain[:54] + extensions + plain[54:]
    header = vnet(gso=GSO_TCPV6, segment_bytes=1, start=54 + len(extensions))
    arrived, statistics = send(header, data, queue_bytes=256 * 1024)
    assert 0 < len(arrived) < 1000
    assert len(arrived) + statistics.lost_full == 1000


@pytest.mark.parametrize(
    "header",
    [
        vnet(start=len(tcp_frame(b"x" * 100)) - 17),
        vnet(start=0xFFFF, offset=0xFFFF),
        vnet(start=0, offset=0xFFFF),
        vnet(flags=0, gso=GSO_TCPV4, segment_bytes=50),
        vnet(gso=GSO_TCPV4, segment_bytes=0),
        vnet(gso=GSO_TCPV6, segment_bytes=50),
        vnet(gso=GSO_TCPV4, segment_bytes=50, start=35),
        vnet(gso=GSO_TCPV4, segment_bytes=50, offset=6),
        vnet(gso=GSO_TCPV4, segment_bytes=50, start=13),
        vnet(gso=3, segment_bytes=50),
        vnet(gso=5, segment_bytes=50),
        vnet(gso=0x7F),
    ],
)
def test_a_header_without_sense_is_refused(header: bytes) -> None:
    arrived, statistics = send(header, tcp_frame(b"x" * 100))
    assert arrived == []
    assert statistics.refused == 1


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (12, 0x09),  # no IP
        (14, 0x65),  # another version
        (14, 0x46),  # a longer IP header than the checksum's place says
        (23, 17),  # no TCP
        (46, 0x40),  # a TCP header that is too short
        (46, 0xF0),  # and one that is longer than the frame
    ],
)
def test_a_large_frame_that_is_no_tcp_is_refused(at: int, value: int) -> None:
    data = bytearray(tcp_frame(b"x" * 10))
    data[at] = value
    arrived, statistics = send(vnet(gso=GSO_TCPV4, segment_bytes=5), bytes(data))
    assert arrived == []
    assert statistics.refused == 1


def test_a_frame_of_more_than_1024_segments_is_refused() -> None:
    _, data = large(2000, 4)
    assert send(vnet(gso=GSO_TCPV4, segment_bytes=1), data)[1].refused == 1


@settings(max_examples=300, deadline=None)
@given(
    st.builds(
        vnet,
        flags=st.integers(0, 3),
        gso=st.sampled_from([0, 1, 3, 4, 0x81, 0x84]) | st.integers(0, 255),
        segment_bytes=st.integers(0, 80) | st.integers(0, 0xFFFF),
        start=st.sampled_from([34, 54, 38, 42]) | st.integers(0, 0xFFFF),
        offset=st.sampled_from([16, 6]) | st.integers(0, 0xFFFF),
    ),
    st.sampled_from(
        [tcp_frame(b"x" * 300, version=v, tags=t) for v in (4, 6) for t in (0, 1, 2, 3)]
    )
    | st.binary(min_size=14, max_size=200),
    st.dictionaries(st.integers(0, 60), st.integers(0, 255), max_size=4),
    st.integers(0, 15),
)
def test_whatever_comes_is_sent_or_refused(
    header: bytes, data: bytes, changes: dict[int, int], takes: int
) -> None:
    mutable = bytearray(data)
    for at, value in changes.items():
        if at < len(mutable):
            mutable[at] = value
    arrived, statistics = send(header, bytes(mutable), takes=takes)
    assert statistics.refused == (not arrived)
    for each in arrived:
        assert 14 <= len(each) <= FRAME_MAX_BYTES
        if len(arrived) > 1:
            assert len(each) <= len(mutable)
