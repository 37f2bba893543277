"""A host that refuses: at each of its calls a microVM meets a typed error, or lives without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fakes import failing_host

Assemble = Callable[[str], Path]

POINTS = 0 if os.environ.get("AVMM_VARIANTS") else 12
"""Of each walk; all of them on demand."""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return failing_host.build(tmp_path_factory.mktemp("failing_host"))


@pytest.mark.slow
@pytest.mark.parametrize(("loop", "transport"), [("uvloop", "pci"), ("asyncio", "mmio")])
def test_a_life_that_is_refused_the_nth_call_for_all_n(
    tiny_guest: Assemble,
    tmp_path: Path,
    library: Path,
    capsys: pytest.CaptureFixture[str],
    loop: str,
    transport: str,
) -> None:
    """Nothing hangs, crashes or is left, and nothing untyped is raised."""
    kernel = tiny_guest("putc 'x'\n1: jmp 1b")
    arguments = (kernel, tmp_path, loop, transport, POINTS)
    walked = subprocess.run(
        [sys.executable, "-m", "fakes.failing_start", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=failing_host.environment(library),
    )
    reports = [json.loads(line) for line in walked.stdout.splitlines()]
    assert walked.returncode == 0, walked.stderr
    with capsys.disabled():
        points, calls = (sum(report[what] for report in reports) for what in ("points", "calls"))
        print(f"\n{loop}, {transport}: {points} failures met, of {calls} calls", end=" ")
    assert [report["wrong"] for report in reports if report["wrong"]] == []
    assert [report["walk"] for report in reports if report["points"] == 0] == []
