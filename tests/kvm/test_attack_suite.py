"""The attack suite, with few storms, on this machine's /dev/kvm."""

from __future__ import annotations

import pytest

from avmm.bench import attack as suite
from avmm.bench.record import OWN
from avmm.bench.suite import Options


def test_the_suite_measures_every_storm(monkeypatch: pytest.MonkeyPatch) -> None:
    few = (suite.STORMS[0], suite.STORMS[-1])
    monkeypatch.setattr(suite, "STORMS", few)
    measured = list(suite.cases(Options(runs=1, seconds=0.05)))
    assert [case.unit for case in measured] == ["req/s", "s"] * len(few)
    assert [len(case.aims) for case in measured] == [1, 0, 0, 0]
    for case in measured:
        assert list(case.series) == [OWN, suite.SPINNING, suite.ALONE]
