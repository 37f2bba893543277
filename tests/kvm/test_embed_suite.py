"""The embed suite, with few microVMs, on this machine's /dev/kvm."""

from __future__ import annotations

import resource

import pytest

from avmm.bench import embed, isolation
from avmm.bench.record import GOAL, LIMIT, OWN
from avmm.bench.suite import Options


def test_starts_rates_and_memory_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "ALIVE", (1, 3))
    monkeypatch.setattr(embed, "_LIMIT_TRIES", 1)
    measured = list(embed.lives(Options(runs=1, seconds=0.001)))
    assert [case.name.split(",")[0] for case in measured] == [
        *("create to first instruction", "start and stop"),
        *("create to first instruction", "start and stop", "memory of a VM without its guest's"),
    ]
    assert all(value > 0 for case in measured for runs in case.series.values() for value in runs)
    first, _, first_of_three, _, memory = measured
    assert list(first.series) == [OWN, GOAL, LIMIT]
    assert [aim.against for aim in first_of_three.aims] == [GOAL, "avmm alone"]
    assert first_of_three.series["avmm alone"] == first.series[OWN]
    assert memory.peers == []


def test_what_the_limit_of_open_files_forbids_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "_LIMIT_TRIES", 1)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (5, 5))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: None)
    left_out: list[str] = []
    assert not list(embed.lives(Options(runs=1, seconds=0.001, leave_out=left_out.append)))
    assert "embed with 500 alive: 6000 open files are needed and 5 allowed" in left_out[-1]
    assert "ulimit -Hn" in left_out[-1]


def test_microvms_in_workers_are_measured_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_STARTS", 1)
    rows = {case.name: case for case in embed.isolated(Options(runs=1, seconds=0.01))}
    assert len(rows) == 4
    for case in rows.values():
        assert all(value > 0 for values in case.series.values() for value in values)
