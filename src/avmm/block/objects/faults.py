"""Faults on purpose: a disk around another one, for tests of what stands above."""

from __future__ import annotations

import asyncio
import errno
import random
from dataclasses import dataclass
from typing import Any

from avmm.block.source import Data, check_source, has, read_from, write_to
from avmm.errors import ConfigError
from avmm.units import SECTOR_BYTES


@dataclass(frozen=True, slots=True)
class FaultRates:
    """How often each fault comes, of 0.0 to 1.0 of the calls that it can strike.

    read_error, write_error, flush_error: the call fails and nothing is done. torn_write: only a
    part of the data is written, whole sectors from its beginning, and the call fails. delay: the
    call takes up to delay_s seconds longer, so later ones overtake it.
    """

    read_error: float = 0.0
    write_error: float = 0.0
    flush_error: float = 0.0
    torn_write: float = 0.0
    delay: float = 0.0
    delay_s: float = 0.01

    def __post_init__(self) -> None:
        for name in ("read_error", "write_error", "flush_error", "torn_write", "delay"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError("faults", f"{name}: {getattr(self, name)} is not in 0 to 1")


class FaultyDisk:
    """Another disk with faults. The same seed and the same calls make the same faults.

    base: the disk; it can be any that AsyncDisk takes. rates: may be replaced at any
    time, as a test wants it. counts: faults so far, by the names of FaultRates.
    """

    def __init__(self, base: Any, rates: FaultRates, *, seed: int) -> None:
        check_source(base, f"FaultyDisk: {type(base).__name__}", read_only=True)
        self.base = base
        self.rates = rates
        self.counts = dict.fromkeys(
            ("read_error", "write_error", "flush_error", "torn_write", "delay"), 0
        )
        self._random = random.Random(seed)

    @property
    def size(self) -> int:
        """Of the disk below."""
        return int(self.base.size)

    async def read(self, offset: int, size: int) -> Data:
        """Read, late or not at all."""
        fails = self._strikes("read_error")
        await self._delay()
        if fails:
            raise OSError(errno.EIO, f"read at {offset} fails on purpose")
        return await read_from(self.base, offset, size)

    async def write(self, offset: int, data: bytes) -> None:
        """Write, late, in part or not at all."""
        fails, torn = self._strikes("write_error"), self._strikes("torn_write")
        part = self._random.randrange(len(data) // SECTOR_BYTES) * SECTOR_BYTES if torn else 0
        await self._delay()
        if fails or torn:
            if part:
                await write_to(self.base, offset, data[:part])
            raise OSError(errno.EIO, f"write at {offset} fails on purpose after {part} bytes")
        await write_to(self.base, offset, data)

    async def flush(self) -> None:
        """Flush, late or not at all."""
        fails = self._strikes("flush_error")
        await self._delay()
        if fails:
            raise OSError(errno.EIO, "flush fails on purpose")
        if has(self.base, "flush"):
            await self.base.flush()

    async def discard(self, offset: int, size: int) -> None:
        """As the disk below does it."""
        if not has(self.base, "discard"):
            raise NotImplementedError
        await self.base.discard(offset, size)

    def _strikes(self, name: str) -> bool:
        # Drawn in any case: a rate that is 0 must not shift the faults of the others.
        rate: float = getattr(self.rates, name)
        strikes = self._random.random() < rate
        self.counts[name] += strikes
        return strikes

    async def _delay(self) -> None:
        delay_s = self._random.uniform(0, self.rates.delay_s)
        if self._strikes("delay"):
            await asyncio.sleep(delay_s)
