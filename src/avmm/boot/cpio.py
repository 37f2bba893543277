"""cpio archives as an initramfs is made of ("newc", Linux's early-userspace/buffer-format)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_MAGIC = b"070701"
_END = "TRAILER!!!"
ALIGNMENT = 4
"""An archive begins at such a multiple of bytes behind the one before it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file, folder or symbolic link. mode: with the type's bits; data: of a link, its target."""

    path: str
    mode: int
    data: bytes = b""


def archive(entries: Iterable[Entry]) -> bytes:
    """The archive of these entries, all of them root's; folders before what is in them."""
    parts = [_member(entry, number) for number, entry in enumerate(entries, start=1)]
    return b"".join(parts) + _member(Entry(_END, 0), 0)


def padding(size_bytes: int) -> int:
    """Bytes of zero that have to follow so many of one archive before the next."""
    return -size_bytes % ALIGNMENT


def _member(entry: Entry, inode: int) -> bytes:
    name = entry.path.encode() + b"\0"
    fields = (
        *(inode, entry.mode, 0, 0, 1, 0, len(entry.data)),
        *(0, 0, 0, 0, len(name), 0),
    )
    head = _MAGIC + b"".join(b"%08X" % field for field in fields) + name
    return b"".join(part + bytes(padding(len(part))) for part in (head, entry.data))
