"""A small encoder for ACPI Machine Language (ACPI 6.4 chapter 20; resources 6.4).

Every function returns the bytes of one term; terms nest by being passed on.
"""

from __future__ import annotations

import struct

ZERO = b"\x00"
ONE = b"\x01"
ARG0 = b"\x68"
LOCAL0 = b"\x60"
ARG3 = b"\x6b"

_PKG_LENGTH_1_BYTE_MAX = 0x3F


def pkg_length(body_bytes: int) -> bytes:
    """PkgLength of a body: it counts its own bytes too (20.2.4)."""
    if body_bytes + 1 <= _PKG_LENGTH_1_BYTE_MAX:
        return bytes([body_bytes + 1])
    for extra in (1, 2, 3):
        total = body_bytes + 1 + extra
        if total < 1 << 4 + 8 * extra:
            return bytes([extra << 6 | total & 0xF]) + (total >> 4).to_bytes(extra, "little")
    raise ValueError(f"AML package of {body_bytes} bytes is too long")


def _packaged(opcode: bytes, body: bytes) -> bytes:
    return opcode + pkg_length(len(body)) + body


def name_string(path: str) -> bytes:
    r"""A name such as "_CRS", "\_SB" or "\_SB.PWRB"; segments are padded to four bytes."""
    root = path.startswith("\\")
    segments = [s for s in path.lstrip("\\").split(".") if s]
    if any(len(s) > 4 for s in segments):
        raise ValueError(f"AML name {path!r}: a segment has more than four characters")
    packed = [s.ljust(4, "_").encode("ascii") for s in segments]
    prefix = b"\\" if root else b""
    match len(packed):
        case 0:
            return prefix + b"\x00"
        case 1:
            return prefix + packed[0]
        case 2:
            return prefix + b"\x2e" + b"".join(packed)
        case count:
            return prefix + b"\x2f" + bytes([count]) + b"".join(packed)


def integer(value: int) -> bytes:
    """The shortest constant."""
    if value in (0, 1):
        return bytes([value])
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if value < 1 << 8 * size:
            return bytes([prefix]) + value.to_bytes(size, "little")
    raise ValueError(f"AML integer {value:#x} has more than 64 bits")


def string(text: str) -> bytes:
    """A string constant, ASCII."""
    return b"\x0d" + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """The integer for an id such as "PNP0501" (19.3.4): three letters, four hex digits."""
    letters = [ord(c) - 0x40 & 0x1F for c in text[:3]]
    packed = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(text[3:], 16)
    return integer(int.from_bytes(packed.to_bytes(4, "big"), "little"))


def name(path: str, value: bytes) -> bytes:
    """Name (path, value)."""
    return b"\x08" + name_string(path) + value


def package(*elements: bytes) -> bytes:
    """Package () {elements}."""
    return _packaged(b"\x12", bytes([len(elements)]) + b"".join(elements))


def buffer(data: bytes) -> bytes:
    """Buffer (length) {data}."""
    return _packaged(b"\x11", integer(len(data)) + data)


def scope(path: str, *terms: bytes) -> bytes:
    """Scope (path) {terms}."""
    return _packaged(b"\x10", name_string(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """Device (path) {terms}."""
    return _packaged(b"\x5b\x82", name_string(path) + b"".join(terms))


def method(path: str, arguments: int, *terms: bytes) -> bytes:
    """Method (path, arguments, NotSerialized) {terms}."""
    return _packaged(b"\x14", name_string(path) + bytes([arguments]) + b"".join(terms))


def io_region(path: str, port: int, size_bytes: int) -> bytes:
    """OperationRegion (path, SystemIO, port, size)."""
    return b"\x5b\x80" + name_string(path) + b"\x01" + integer(port) + integer(size_bytes)


def byte_field(region: str, path: str) -> bytes:
    """Field (region, ByteAcc, NoLock, WriteAsZeros) {path, 8}."""
    return _packaged(b"\x5b\x81", name_string(region) + b"\x41" + name_string(path) + b"\x08")


def store(value: bytes, target: bytes) -> bytes:
    """Store (value, target)."""
    return b"\x70" + value + target


def bit_and(left: bytes, right: bytes) -> bytes:
    """And (left, right), as a value."""
    return b"\x7b" + left + right + b"\x00"


def if_(condition: bytes, *terms: bytes) -> bytes:
    """If (condition) {terms}."""
    return _packaged(b"\xa0", condition + b"".join(terms))


def return_(value: bytes) -> bytes:
    """Return (value)."""
    return b"\xa4" + value


def notify(path: str, value: int) -> bytes:
    """Notify (path, value)."""
    return b"\x86" + name_string(path) + integer(value)


def resource_template(*descriptors: bytes) -> bytes:
    """ResourceTemplate () {descriptors}, with its end tag (a checksum of 0 is not checked)."""
    return buffer(b"".join(descriptors) + b"\x79\x00")


def io_ports(port: int, count: int) -> bytes:
    """IO (Decode16, port, port, 1, count)."""
    return b"\x47\x01" + struct.pack("<HHBB", port, port, 1, count)


def memory32_fixed(base: int, size_bytes: int) -> bytes:
    """Memory32Fixed (ReadWrite, base, size)."""
    return b"\x86" + struct.pack("<HBII", 9, 1, base, size_bytes)


_PRODUCER = 0b1100
"""Passed on to what is below; both ends are fixed (6.4.3.5)."""
_MEMORY, _IO, _BUS = 0, 1, 2
_READ_WRITE, _ENTIRE_RANGE = 1, 3


def bus_numbers(first: int, last: int) -> bytes:
    """WordBusNumber (ResourceProducer, MinFixed, MaxFixed, , 0, first, last, 0, length)."""
    return b"\x88" + struct.pack(
        "<HBBBHHHHH", 13, _BUS, _PRODUCER, 0, 0, first, last, 0, last - first + 1
    )


def io_window(port: int, count: int) -> bytes:
    """WordIO (ResourceProducer, MinFixed, MaxFixed, , EntireRange, 0, port, last, 0, count)."""
    last = port + count - 1
    return b"\x88" + struct.pack(
        "<HBBBHHHHH", 13, _IO, _PRODUCER, _ENTIRE_RANGE, 0, port, last, 0, count
    )


def memory_window(gpa: int, size_bytes: int) -> bytes:
    """QWordMemory (ResourceProducer, , MinFixed, MaxFixed, NonCacheable, ReadWrite, 0, gpa, last,
    0, size), or DWordMemory below 4 GiB."""
    last = gpa + size_bytes - 1
    short = last < 1 << 32 and size_bytes < 1 << 32  # all of the first 4 GiB is too long
    tag, length, layout = (b"\x87", 23, "IIIII") if short else (b"\x8a", 43, "QQQQQ")
    return tag + struct.pack(
        f"<HBBB{layout}", length, _MEMORY, _PRODUCER, _READ_WRITE, 0, gpa, last, 0, size_bytes
    )


def interrupt(gsi: int) -> bytes:
    """Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) {gsi}."""
    return b"\x89" + struct.pack("<HBBI", 6, 0b0000_0011, 1, gsi)
