"""The rows of a disk written in Python come with rates, at native speed and with the right data."""

from __future__ import annotations

import pytest

from avmm.bench import python_disk
from avmm.bench.suite import Options


@pytest.mark.slow
def test_each_row_is_measured_against_its_goal() -> None:
    cases = list(python_disk.cases("embed", Options(runs=1, seconds=0.01)))
    assert [case.name for case in cases] == [
        f"Python RAM disk, {name}" for name, _, _ in python_disk.ROWS
    ]
    for case in cases:
        assert case.series["avmm"][0] > 0
        assert case.costs["avmm"].cpu_s_per_request
        assert bool(case.aims) == ("goal" in case.series)
