"""Sizes and addresses: the units that cross avmm's borders."""

from __future__ import annotations

import re
from typing import NewType

from avmm.errors import ConfigError

Gpa = NewType("Gpa", int)
"""A guest physical address, in bytes."""

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
PAGE_BYTES = 4096
SECTOR_BYTES = 512

_SUFFIX = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": 1 << 40}
_SIZE = re.compile(r"([0-9]{1,19})([KMGT]?)(?:iB|B)?", re.IGNORECASE | re.ASCII)
_SIZE_END = 1 << 63  # as of a file


def parse_size(text: str | int, what: str) -> int:
    """Bytes of a size such as 4096, "512M" or "2GiB"; suffixes are powers of 1024.

    what: names the option in the ConfigError("size") raised for anything else.
    """
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text.strip())
    if not match or (size := int(match[1]) * _SUFFIX[match[2].upper()]) >= _SIZE_END:
        raise ConfigError(
            "size", f"{what}: {text[:40]!r} is not a size; write for example 512M or 2G"
        )
    return size


def format_size(size_bytes: int) -> str:
    """The shortest exact form with a binary suffix: 536870912 is "512M"."""
    for suffix in ("T", "G", "M", "K"):
        if size_bytes and size_bytes % _SUFFIX[suffix] == 0:
            return f"{size_bytes // _SUFFIX[suffix]}{suffix}"
    return str(size_bytes)


def align_up(value: int, alignment: int) -> int:
    """`value` rounded up to a multiple of `alignment`, a power of two."""
    return (value + alignment - 1) & -alignment
