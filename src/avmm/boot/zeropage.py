"""struct boot_params, the "zero page" of the Linux/x86 64-bit boot protocol."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from avmm.boot.bzimage import HEADER_AT
from avmm.boot.e820 import memory_map
from avmm.mem import layout
from avmm.mem.guest import GuestMemory
from avmm.units import PAGE_BYTES, Gpa

_ACPI_RSDP_AT = 0x70
_E820_ENTRIES_AT = 0x1E8
_E820_TABLE_AT = 0x2D0
_E820_ENTRY = struct.Struct("<QQI")
_VID_MODE_NORMAL = 0xFFFF
_LOADER_UNDEFINED = 0xFF
_LOADFLAGS_LOADED_HIGH = 1 << 0


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the parts of a boot lie in guest memory; sizes in bytes."""

    cmdline: Gpa
    cmdline_bytes: int
    initrd: Gpa
    initrd_bytes: int
    rsdp: Gpa


def write(memory: GuestMemory, setup_header: bytes | None, place: Placement) -> None:
    """Write it at layout.ZERO_PAGE. setup_header: the bzImage's own, from HEADER_AT on; None for
    a bare ELF kernel, which gets a minimal one."""
    page = bytearray(PAGE_BYTES)
    if setup_header is not None:
        page[HEADER_AT : HEADER_AT + len(setup_header)] = setup_header
    else:
        struct.pack_into("<H4sH", page, 0x1FE, 0xAA55, b"HdrS", 0x020F)
        struct.pack_into("<I", page, 0x230, 0x20_0000)  # kernel_alignment
    struct.pack_into("<H", page, 0x1FA, _VID_MODE_NORMAL)
    page[0x210] = _LOADER_UNDEFINED
    page[0x211] |= _LOADFLAGS_LOADED_HIGH
    struct.pack_into("<II", page, 0x218, place.initrd, place.initrd_bytes)
    struct.pack_into("<I", page, 0x228, place.cmdline)
    struct.pack_into("<I", page, 0x238, place.cmdline_bytes)
    struct.pack_into("<Q", page, _ACPI_RSDP_AT, place.rsdp)
    table = memory_map(memory.ranges)
    page[_E820_ENTRIES_AT] = len(table)
    for index, entry in enumerate(table):
        _E820_ENTRY.pack_into(page, _E820_TABLE_AT + index * _E820_ENTRY.size, *entry)
    memory.write(layout.ZERO_PAGE, page)
