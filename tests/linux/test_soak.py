"""All devices at full load at once: a short turn of scripts/soak."""

from __future__ import annotations

from pathlib import Path

import pytest

from avmm.bench.guest.soak import soak
from linux.guest import Assets, emulated_in_threads

SECONDS, INTERVAL_S = 20.0, 5.0
CPUS = 1 if emulated_in_threads() else 2


@pytest.mark.slow
async def test_two_disks_and_two_nics_at_full_load(assets: Assets, tmp_path: Path) -> None:
    result = await soak(
        assets.kernel("cloud", "vmlinuz"),
        assets.initrd("cloud"),
        tmp_path,
        seconds=SECONDS,
        interval_s=INTERVAL_S,
        say=print,
        cpus=CPUS,
        io_threads=1,
    )
    assert not result.problems
    assert result.intervals == SECONDS / INTERVAL_S
    assert len(result.rounds) == 4
