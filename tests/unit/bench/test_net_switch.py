"""The suite of the in-process switch measures what it says."""

from __future__ import annotations

from avmm.bench import net_switch
from avmm.bench.record import OWN
from avmm.bench.suite import Options


def test_every_row_moves_frames() -> None:
    cases = list(net_switch.cases(Options(runs=1, seconds=0.005)))
    assert [case.name for case in cases] == [row.name for row in net_switch.ROWS]
    for case in cases:
        assert all(rate > 100 for runs in case.series.values() for rate in runs)
        assert OWN in case.series
