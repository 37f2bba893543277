"""A disk as a Python object: what it has to offer, and how that is checked."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

from avmm.block.raw import Topology
from avmm.errors import ConfigError
from avmm.units import PAGE_BYTES, SECTOR_BYTES

Data = bytes | bytearray | memoryview
"""What a read may return."""


class BlockSource(Protocol):
    """A disk whose bytes are read by a coroutine.

    Offsets and sizes are in bytes, multiples of 512, within `size`. Many calls are under way at
    once, and may return in any order; the guest knows that, and waits where the order matters. A
    call that hangs holds up its own request only. A request of more than 4 MiB is several calls,
    one after the other, and calls for no more than 64 MiB and one request are under way. On a reset
    of the device, or when the machine stops, calls still under way are cancelled, and their
    requests are over when that is done; one that goes on for 5 seconds after it was cancelled is
    given up, with an error in the log. A pause of the machine waits for the calls under way.

    What a call raises becomes the guest's error: OSError and everything else an I/O error, with a
    line in the log; NotImplementedError "unsupported".

    Optional, found when the disk is attached:

    - `async write(offset, data: bytes)`: without it the disk has to be attached read-only.
    - `async flush()`: what was written when it is called is durable when it returns. Without it
      writes have to be as durable as they get when they return.
    - `async discard(offset, size)`: the range reads as zeroes from now on and needs no room.
      Without it the guest's trim is not offered, and its zeroes are written. Raising
      NotImplementedError has the same effect for one call.
    - `async read_into(offset, views)` and `async write_from(offset, views)` in place of read and
      write: a list of memoryviews, which are the guest's own memory, to be filled or taken as a
      whole. They are valid, slices of them too, until the call returns; and the guest may change
      what it writes meanwhile, so what is looked at is copied first.
    """

    @property
    def size(self) -> int:
        """Bytes, a multiple of 512; it may change, and resize() tells the guest."""
        ...

    async def read(self, offset: int, size: int) -> Data:
        """Exactly `size` bytes from `offset` on."""
        ...


class WritableSource(BlockSource, Protocol):
    """A disk that can be written as well."""

    async def write(self, offset: int, data: bytes) -> None:
        """All of it, at `offset`."""
        ...


class ViewSource(Protocol):
    """A disk that reads into the guest's memory."""

    @property
    def size(self) -> int:
        """As BlockSource.size."""
        ...

    async def read_into(self, offset: int, views: Sequence[memoryview]) -> None:
        """Fill all of them, one after the other, from `offset` on."""
        ...


AnySource = BlockSource | WritableSource | ViewSource

_METHODS = {
    "read": ("offset", "size"),
    "read_into": ("offset", "views"),
    "write": ("offset", "data"),
    "write_from": ("offset", "views"),
    "flush": (),
    "discard": ("offset", "size"),
}


def check_source(source: Any, what: str, *, read_only: bool) -> None:
    """Raises ConfigError("disk") unless `source` can be a disk; `what` begins its message."""
    if isinstance(source, type):
        raise ConfigError("disk", f"{what}: an object is needed, not the class {source.__name__}")
    if not hasattr(source, "size"):
        raise ConfigError("disk", f"{what}: it has no size; an async disk has one, in bytes")
    measure(source, what)
    for name, parameters in _METHODS.items():
        method = getattr(source, name, None)
        if method is not None:
            _check_method(method, f"{what}: {name}({', '.join(parameters)})", len(parameters))
    if not has(source, "read") and not has(source, "read_into"):
        raise ConfigError("disk", f"{what}: it has no async read(offset, size)")
    if not read_only and not has(source, "write") and not has(source, "write_from"):
        raise ConfigError(
            "disk", f"{what}: it has no async write(offset, data); attach it with read_only=True"
        )


def has(source: Any, name: str) -> bool:
    """Whether it offers an optional method."""
    return getattr(source, name, None) is not None


def measure(source: Any, what: str) -> int:
    """Its present size in bytes. Raises ConfigError("disk") for one that no disk can have."""
    size = source.size
    if not isinstance(size, int) or isinstance(size, bool):
        raise ConfigError("disk", f"{what}: size is {size!r}, not a number of bytes")
    if size <= 0 or size % SECTOR_BYTES:
        raise ConfigError(
            "disk", f"{what}: size {size} is not a positive multiple of {SECTOR_BYTES}"
        )
    return size


async def read_from(source: Any, offset: int, size: int) -> Data:
    """Read from a disk of either kind, for those that stand before another."""
    if has(source, "read"):
        data: Data = await source.read(offset, size)
        return data
    data = bytearray(size)
    await source.read_into(offset, [memoryview(data)])
    return data


async def write_to(source: Any, offset: int, data: bytes) -> None:
    """Write to a disk of either kind."""
    if has(source, "write"):
        await source.write(offset, data)
    else:
        await source.write_from(offset, [memoryview(data)])


def _check_method(method: Any, what: str, parameters: int) -> None:
    if not inspect.iscoroutinefunction(method):
        raise ConfigError("disk", f"{what} has to be a coroutine function (async def)")
    try:
        inspect.signature(method).bind(*range(parameters))
    except TypeError as e:
        raise ConfigError("disk", f"{what} cannot be called so: {e}") from e


class SourceDisk:
    """An object as the block device sees its disks; as RawDisk is for files."""

    fd = -1
    alignment_bytes = 1
    copies = True

    def __init__(self, source: AnySource, *, read_only: bool) -> None:
        self.source = source
        self.path = type(source).__name__
        self.read_only = read_only
        self.size_bytes = self.measure()

    @property
    def discards(self) -> bool:
        """Whether trim is offered to the guest."""
        return not self.read_only and has(self.source, "discard")

    def measure(self) -> int:
        """The size in bytes as it is now. Raises ConfigError("disk") for one no disk can have."""
        return measure(self.source, f"Disk {self.path}")

    def topology(self) -> Topology:
        """Sectors, best used by the page."""
        return Topology(SECTOR_BYTES, PAGE_BYTES, 0, PAGE_BYTES, 0)
