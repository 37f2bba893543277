"""Small valid kernels: ELF64 with or without a PVH note, and bzImages around them."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
from collections.abc import Callable

import lz4.block
import zstandard

ENTRY = 0x100_0000
CODE = bytes(range(1, 200)) * 40
PVH_ENTRY = ENTRY + 0x850
BSS_BYTES = 0x3000


def elf_kernel(
    *, pvh: bool = True, machine: int = 62, code: bytes = CODE, address: int = ENTRY
) -> bytes:
    """One PT_LOAD with `code` and some bss at `address`, and a PT_NOTE when `pvh`."""
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", PVH_ENTRY)
    headers = 2 if pvh else 1
    code_at = 0x1000
    note_at = code_at + len(code)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    image = struct.pack(
        "<16sHHIQQQIHHHHHH", ident, 2, machine, 1, address, 64, 0, 0, 64, 56, headers, 0, 0, 0
    )
    image += struct.pack(
        "<IIQQQQQQ", 1, 7, code_at, address, address, len(code), len(code) + BSS_BYTES, 0x1000
    )
    if pvh:
        image += struct.pack("<IIQQQQQQ", 4, 4, note_at, 0, 0, len(note), len(note), 4)
    return image.ljust(code_at, b"\0") + code + (note if pvh else b"")


def _lz4_legacy(data: bytes) -> bytes:
    blocks = b"\x02\x21\x4c\x18"
    for at in range(0, len(data), 8 << 20):
        block = lz4.block.compress(data[at : at + (8 << 20)], store_size=False)
        blocks += struct.pack("<I", len(block)) + block
    return blocks


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lambda data: lzma.compress(data, lzma.FORMAT_XZ, check=lzma.CHECK_CRC32),
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "bzip2": bz2.compress,
    "lz4": _lz4_legacy,
    "zstd": zstandard.ZstdCompressor().compress,
}


def bzimage(
    payload: bytes, *, unpacked_bytes: int = 0, protocol: int = 0x020F, xloadflags: int = 1
) -> bytes:
    """A bzImage with `payload`, behind which the kernel's build puts the unpacked size."""
    payload += struct.pack("<I", unpacked_bytes)
    setup = bytearray(2 * 512)
    setup[0x1F1] = 1
    struct.pack_into("<H", setup, 0x1FE, 0xAA55)
    setup[0x200:0x202] = b"\xeb\x66"
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, protocol)
    struct.pack_into("<I", setup, 0x22C, 0x7FFF_FFFF)
    struct.pack_into("<I", setup, 0x230, 0x20_0000)
    setup[0x234] = 1
    struct.pack_into("<H", setup, 0x236, xloadflags)
    struct.pack_into("<I", setup, 0x238, 2047)
    struct.pack_into("<II", setup, 0x248, 0x400, len(payload))
    struct.pack_into("<QI", setup, 0x258, ENTRY, 0x10_0000)
    return bytes(setup) + b"\x90" * 0x400 + payload
