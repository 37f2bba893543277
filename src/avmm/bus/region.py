"""What a device looks like from a bus: an offset, a size, a value."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Call:
    """Run `action` on the loop; the vCPU's instruction completes when it is done, and `after` too,
    which runs on the vCPU's own thread next, and may block there."""

    action: Callable[[], Awaitable[None] | None]
    after: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class Post:
    """Run `action` on the loop; the vCPU goes on at once."""

    action: Callable[[], None]


Deferred = Call | Post


class Region(Protocol):
    """A device's registers. Called on vCPU threads, several at a time; must not block."""

    def read(self, offset: int, size: int) -> int:
        """The register's value; size: 1, 2, 4 or 8 bytes. Bits above `size` are ignored."""
        ...

    def write(self, offset: int, size: int, value: int) -> Deferred | None:
        """Take `value`; what has to happen on the loop is returned, not done."""
        ...
