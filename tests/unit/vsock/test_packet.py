"""Headers as they stand in memory (virtio 1.3 section 5.10.6)."""

from __future__ import annotations

from avmm.vsock.packet import HEADER_BYTES, Header, Op, parse, reset_for

WIRE = bytes.fromhex(
    "0300000000000000 0200000000000000 01040000 00080000 07000000 0100 0500 03000000"
    "00000400 78563412".replace(" ", "")
)
HEADER = Header(3, 2, 1025, 2048, 7, 1, Op.RW, 3, 0x40000, 0x12345678)


def test_5_10_6_a_header_is_44_bytes_in_little_endian() -> None:
    assert HEADER_BYTES == 44
    assert HEADER.pack() == WIRE
    assert list(parse(WIRE)) == [HEADER]


def test_headers_are_parsed_one_after_the_other() -> None:
    other = HEADER._replace(op=99, type=7, size_bytes=0xFFFF_FFFF, src_cid=2**64 - 1)
    assert list(parse(memoryview(WIRE + other.pack()))) == [HEADER, other]


def test_a_reset_goes_back_where_its_cause_came_from() -> None:
    assert reset_for(HEADER) == Header(2, 3, 2048, 1025, 0, 1, Op.RST, 0, 0, 0)
