"""struct hvm_start_info, version 1: what the PVH entry gets in EBX (Xen's x86/HVM start info)."""

from __future__ import annotations

import struct

from avmm.boot.e820 import memory_map
from avmm.boot.zeropage import Placement
from avmm.mem import layout
from avmm.mem.guest import GuestMemory

_MAGIC = 0x336EC578
_VERSION = 1
_START_INFO = struct.Struct("<IIIIQQQQII")
_MODULE = struct.Struct("<QQQQ")
_MAP_ENTRY = struct.Struct("<QQII")


def write(memory: GuestMemory, place: Placement) -> None:
    """Write it at layout.PVH_START_INFO, the initrd as its one module."""
    table = memory_map(memory.ranges)
    modules_at = layout.PVH_START_INFO + _START_INFO.size
    map_at = modules_at + _MODULE.size
    start_info = _START_INFO.pack(
        _MAGIC,
        _VERSION,
        0,
        1 if place.initrd_bytes else 0,
        modules_at,
        place.cmdline,
        place.rsdp,
        map_at,
        len(table),
        0,
    )
    module = _MODULE.pack(place.initrd, place.initrd_bytes, 0, 0)
    rows = b"".join(_MAP_ENTRY.pack(gpa, size, kind, 0) for gpa, size, kind in table)
    memory.write(layout.PVH_START_INFO, start_info + module + rows)
