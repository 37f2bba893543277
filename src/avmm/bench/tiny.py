"""Guests of a few instructions, for any KVM."""

from __future__ import annotations

import struct

ENTRY = 0x10_0000
_CODE_AT = 0x1000


def elf(code: bytes) -> bytes:
    """An ELF kernel of 64-bit code that is loaded and entered at ENTRY; any of our tiny guests
    has 4 MiB, of which it uses the first two."""
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, 62, 1, ENTRY, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, _CODE_AT, ENTRY, ENTRY, len(code), len(code), 0x1000)
    return (header + segment).ljust(_CODE_AT, b"\0") + code
