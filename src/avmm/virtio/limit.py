"""Rate limits of disks and NICs: what a user says, and the native limiter that a device's queues
share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from typing import Annotated

import msgspec

from avmm.config import Checked
from avmm.errors import ConfigError, HostError
from avmm.native import CData, ffi, lib
from avmm.units import parse_size

_MAX = 1 << 50
_BURST_S = 0.1


class RateLimit(Checked, frozen=True):
    """How much a disk, or one direction of a NIC, may do; for all of its queues together.

    Each limit is a token bucket: it fills at its rate up to its burst, and requests are begun as
    long as it is not empty. The bytes of a request may be more than there are in it. They are owed
    then, and the next request waits until that is paid. So requests of any size pass, and what is
    begun in t seconds is at most burst + rate * t and one request more. A request that is refused
    counts as one, with no bytes.

    A burst below a few milliseconds' worth of its rate costs some of the rate: the bucket is full
    before anybody comes to empty it.
    """

    bps: Annotated[
        str | int | None, msgspec.Meta(description="bytes a second, as a number or like 100M")
    ] = None
    ops: Annotated[int | None, msgspec.Meta(description="requests, or packets, a second")] = None
    bps_burst: Annotated[
        str | int | None,
        msgspec.Meta(description="bytes at once after a rest; by default those of 0.1 s"),
    ] = None
    ops_burst: Annotated[
        int | None,
        msgspec.Meta(description="requests at once after a rest; by default those of 0.1 s"),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bps", "ops"):
            rate, burst = getattr(self, name), getattr(self, f"{name}_burst")
            if rate is None and burst is not None:
                raise ConfigError("limit", f"{name}_burst: {burst} needs a rate, {name}")
            for key, value in ((name, rate), (f"{name}_burst", burst)):
                if value is not None and not 1 <= parse_size(value, key) <= _MAX:
                    raise ConfigError(
                        "limit",
                        f"{key}: {value} is not in 1 to 1024T; leave it out for no limit",
                    )

    # What follows is for devices.

    def native(self) -> CData:
        """As struct av_rates."""
        rates = ffi.new("struct av_rates *")
        rates.bytes, rates.bytes_burst = _bucket(self.bps, self.bps_burst)
        rates.ops, rates.ops_burst = _bucket(self.ops, self.ops_burst)
        return rates


def _bucket(rate: str | int | None, burst: str | int | None) -> tuple[int, int]:
    if rate is None:
        return 0, 0
    rate = parse_size(rate, "rate")
    return rate, max(1, int(rate * _BURST_S)) if burst is None else parse_size(burst, "burst")


class Limiter:
    """One limit of a device. Loop. Made before the native lanes that will obey it."""

    def __init__(self, stack: AsyncExitStack, op: str) -> None:
        self.limit: RateLimit | None = None
        self.native: CData = lib.av_limiter_create()
        if not self.native:
            raise HostError("memory", op=op)
        stack.callback(lib.av_limiter_destroy, self.native)

    def set(self, limit: RateLimit | None) -> None:
        """From now on, for what waits too. What is owed stays owed; None forgives it."""
        self.limit = limit
        lib.av_limiter_set(self.native, limit.native() if limit else ffi.new("struct av_rates *"))


def attach(natives: Iterable[CData], obey: Callable[[CData], int], op: str) -> None:
    """Let lanes obey their limiters by av_..._limit(). Raises HostError: each needs a timer."""
    for native in natives:
        result = obey(native)
        if result < 0:
            raise HostError("limit", op=f"A rate limit for {op}", errno=-result)
