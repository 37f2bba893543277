"""A short turn of scripts/soak --ground kvm."""

from __future__ import annotations

from pathlib import Path

import pytest

from avmm.bench.soak import soak


@pytest.mark.slow
@pytest.mark.asyncio(loop_factories=["uvloop"])
async def test_guests_come_and_go_and_leave_nothing(tmp_path: Path) -> None:
    result = await soak(tmp_path, seconds=3, interval_s=0.5, guests=2, seed=3)
    assert result.problems == []
    assert sum(result.lives.values()) == sum(result.ends.values()) >= 2
    assert result.requests > 0
