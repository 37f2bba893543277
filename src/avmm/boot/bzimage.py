"""bzImage: the setup header (Linux/x86 boot protocol) and the compressed kernel inside."""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from avmm.errors import ConfigError
from avmm.units import MIB, Gpa

_BOOT_FLAG_AT = 0x1FE
HEADER_AT = 0x1F1
_MAGIC_AT = 0x202
_MAGIC = b"HdrS"
_PROTOCOL_MIN = 0x020C
_XLF_KERNEL_64 = 1 << 0
_UNPACKED_MAX_BYTES = 1024 * MIB
_LZ4_LEGACY_BLOCK_BYTES = 8 * MIB
_CHUNK_BYTES = 4 * MIB


@dataclass(frozen=True, slots=True)
class SetupHeader:
    """The fields of the header that loading uses. Sizes in bytes."""

    raw: bytes
    """From HEADER_AT to the header's own end, to be copied into the zero page."""
    kernel_at: int
    """File offset of the protected-mode kernel."""
    entry_64bit: bool
    pref_address: Gpa
    init_size: int
    kernel_alignment: int
    relocatable: bool
    initrd_max: int
    """Highest address the initrd may take."""
    cmdline_max: int
    payload_at: int
    payload_bytes: int


def is_bzimage(image: memoryview) -> bool:
    """Whether the file carries the boot protocol's magic."""
    return bytes(image[_MAGIC_AT : _MAGIC_AT + 4]) == _MAGIC


def parse(image: memoryview, name: str) -> SetupHeader:
    """Read the setup header. name: for the ConfigError("kernel") of a bad file."""
    if len(image) < 0x268 or bytes(image[_BOOT_FLAG_AT : HEADER_AT + 15]) != b"\x55\xaa":
        raise ConfigError("kernel", f"Kernel {name}: the bzImage header is cut off or damaged")

    def field(at: int, form: str) -> int:
        return int(struct.unpack_from(form, image, at)[0])

    version = field(0x206, "<H")
    if version < _PROTOCOL_MIN:
        raise ConfigError(
            "kernel",
            f"Kernel {name}: boot protocol {version >> 8}.{version & 0xFF:02d} is too old, 2.12 "
            "(Linux 3.8) is needed",
        )
    kernel_at = ((image[0x1F1] or 4) + 1) * 512
    payload_at = kernel_at + field(0x248, "<I")
    payload_bytes = field(0x24C, "<I")
    if kernel_at >= len(image) or payload_at + payload_bytes > len(image):
        raise ConfigError(
            "kernel", f"Kernel {name}: {len(image)} bytes, but its header promises more: cut off"
        )
    return SetupHeader(
        raw=bytes(image[HEADER_AT : 0x202 + image[0x201]]),
        kernel_at=kernel_at,
        entry_64bit=bool(field(0x236, "<H") & _XLF_KERNEL_64),
        pref_address=Gpa(field(0x258, "<Q")),
        init_size=field(0x260, "<I"),
        kernel_alignment=field(0x230, "<I"),
        relocatable=bool(image[0x234]),
        initrd_max=field(0x22C, "<I"),
        cmdline_max=field(0x238, "<I"),
        payload_at=payload_at,
        payload_bytes=payload_bytes,
    )


def unpack(payload: memoryview) -> Iterator[bytes] | None:
    """The ELF kernel in a bzImage's payload, a piece at a time, so that at no time two copies of
    it are in memory; None when Python cannot read its compression.

    The iterator raises ValueError for a payload that is damaged.
    """
    for magic, unpacker in _UNPACKERS:
        if bytes(payload[: len(magic)]) == magic:
            return _checked(unpacker(payload))
    return None


def _checked(chunks: Iterator[bytes]) -> Iterator[bytes]:
    total = 0
    try:
        for chunk in chunks:
            total += len(chunk)
            if total > _UNPACKED_MAX_BYTES:
                raise ValueError(f"more than {_UNPACKED_MAX_BYTES >> 20} MiB")
            yield chunk
    except (EOFError, OSError, RuntimeError, zlib.error, lzma.LZMAError) as e:
        raise ValueError(str(e)) from e


def _gzip(payload: memoryview) -> Iterator[bytes]:
    # An object, since the payload's length field counts what follows the stream as well.
    unpacker = zlib.decompressobj(wbits=31)
    data: bytes | memoryview = payload
    while not unpacker.eof and len(data):
        yield unpacker.decompress(data, _CHUNK_BYTES)
        data = unpacker.unconsumed_tail


def _pieces(
    unpacker: lzma.LZMADecompressor | bz2.BZ2Decompressor, data: memoryview
) -> Iterator[bytes]:
    yield unpacker.decompress(data, _CHUNK_BYTES)
    while not unpacker.eof and not unpacker.needs_input:
        yield unpacker.decompress(b"", _CHUNK_BYTES)


def _xz(payload: memoryview) -> Iterator[bytes]:
    return _pieces(lzma.LZMADecompressor(lzma.FORMAT_XZ), payload)


def _lzma(payload: memoryview) -> Iterator[bytes]:
    return _pieces(lzma.LZMADecompressor(lzma.FORMAT_ALONE), payload)


def _bzip2(payload: memoryview) -> Iterator[bytes]:
    return _pieces(bz2.BZ2Decompressor(), payload)


def _zstd(payload: memoryview) -> Iterator[bytes]:
    import zstandard

    # A reader, since what it gives at a time is bounded: a few bytes of a frame can be gigabytes.
    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    try:
        # Without the last word, as for lz4.
        with unpacker.stream_reader(payload[:-4]) as reader:
            while chunk := reader.read(_CHUNK_BYTES):
                yield chunk
    except zstandard.ZstdError as e:
        raise ValueError(str(e)) from e


def _lz4_legacy(payload: memoryview) -> Iterator[bytes]:
    """The "legacy" frame that kernels use: blocks of at most 8 MiB, each behind its length."""
    import lz4.block

    at, end = 4, len(payload) - 4  # the last word is the unpacked size, put there by the build
    while at + 4 <= end:
        size = int.from_bytes(payload[at : at + 4], "little")
        at += 4
        if not 0 < size <= end - at:
            raise ValueError("lz4 block length")
        block = payload[at : at + size]
        try:
            yield lz4.block.decompress(block, uncompressed_size=_LZ4_LEGACY_BLOCK_BYTES)
        except lz4.block.LZ4BlockError as e:
            raise ValueError(str(e)) from e
        at += size


_UNPACKERS: tuple[tuple[bytes, Callable[[memoryview], Iterator[bytes]]], ...] = (
    (b"\x1f\x8b", _gzip),
    (b"\xfd7zXZ\0", _xz),
    (b"BZh", _bzip2),
    (b"\x02\x21\x4c\x18", _lz4_legacy),
    (b"\x28\xb5\x2f\xfd", _zstd),
    (b"\x5d\0\0", _lzma),
)
