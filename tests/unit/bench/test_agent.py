"""The agent's rows, with few rounds."""

from __future__ import annotations

import pytest

from avmm.bench import agent
from avmm.bench.record import OWN
from avmm.bench.suite import Options
from avmm.units import MIB


def test_commands_and_files_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "FILE_BYTES", 1 * MIB)
    trips, up, down = agent.cases("embed", Options(runs=1, seconds=0.001))
    assert list(trips.series) == [OWN, agent.ECHO, agent.LOCAL]
    assert [aim.against for aim in trips.aims] == [agent.LOCAL]
    assert all(value > 0 for c in (trips, up, down) for runs in c.series.values() for value in runs)


def test_without_the_program_the_rows_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "PROGRAM", agent.PROGRAM.with_name("none"))
    left_out: list[str] = []
    assert not list(agent.cases("embed", Options(runs=1, seconds=0.0, leave_out=left_out.append)))
    assert "without its guest agent" in left_out[0]
