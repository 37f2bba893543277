"""A host that refuses: at each of its calls a microVM meets a typed error, or lives without."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fakes import failing_host

Assemble = Callable[[str], Path]

LOOPS = pytest.mark.parametrize("loop", ["uvloop", "asyncio"])


@pytest.mark.slow
@pytest.mark.parametrize(("loop", "transport"), [("uvloop", "pci"), ("asyncio", "mmio")])
def test_a_life_that_is_refused_the_nth_call_for_all_n(
    tiny_guest: Assemble,
    tmp_path: Path,
    failing_host_library: Path,
    capsys: pytest.CaptureFixture[str],
    loop: str,
    transport: str,
) -> None:
    """Nothing hangs, crashes or is left, and nothing untyped is raised."""
    kernel = tiny_guest("putc 'x'\n1: jmp 1b")
    arguments = (kernel, tmp_path, loop, transport)
    walked = subprocess.run(
        [sys.executable, "-m", "fakes.failing_start", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=failing_host.environment(failing_host_library),
    )
    reports = [json.loads(line) for line in walked.stdout.splitlines()]
    assert walked.returncode == 0, walked.stderr
    with capsys.disabled():
        points, calls = (sum(report[what] for report in reports) for what in ("points", "calls"))
        print(f"\n{loop}, {transport}: {points} failures met, of {calls} calls", end=" ")
    assert [report["wrong"] for report in reports if report["wrong"]] == []
    assert [report["walk"] for report in reports if report["points"] == 0] == []


@pytest.mark.slow
@LOOPS
def test_what_kvm_answers_a_vcpu_ends_one_guest_or_nothing(
    tiny_guest: Assemble, failing_host_library: Path, loop: str
) -> None:
    kernel = tiny_guest("putc 'x'\ninb 0x603\npoweroff")
    ran = subprocess.run(
        [sys.executable, "-m", "fakes.failing_run", str(kernel), loop],
        capture_output=True,
        text=True,
        env=failing_host.environment(failing_host_library),
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
@LOOPS
def test_signals_stops_and_jumps_of_the_clock_disturb_no_life(
    tiny_guest: Assemble, tmp_path: Path, failing_host_library: Path, loop: str
) -> None:
    kernel = tiny_guest("putc 'x'\n1: inb 0x603\ntest $1, %al\njz 1b\npoweroff")
    with subprocess.Popen(
        [sys.executable, "-m", "fakes.disturbed", str(kernel), loop, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=failing_host.environment(failing_host_library),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        steps = 0
        for _ in process.stdout:
            steps += 1
            process.send_signal(signal.SIGSTOP)
            _, status = os.waitpid(process.pid, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                process.returncode = os.waitstatus_to_exitcode(status)
                break
            process.send_signal(signal.SIGCONT)
        errors = process.stderr.read()
    assert process.returncode == 0, errors
    assert steps > 10
