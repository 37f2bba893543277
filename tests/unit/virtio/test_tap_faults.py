"""A NIC on a TAP that fails, goes down and is removed: the guest loses frames or its carrier."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fakes import failing_host
from fakes.failing_tap import CANNOT


@pytest.mark.slow
@pytest.mark.parametrize("io_threads", [0, 1], ids=["loop", "thread"])
def test_every_failure_of_a_tap_becomes_what_it_should(
    failing_host_library: Path, io_threads: int
) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "fakes.failing_tap", str(io_threads)],
        capture_output=True,
        text=True,
        env=failing_host.environment(failing_host_library),
    )
    if ended.returncode == CANNOT:
        pytest.skip("no CAP_NET_ADMIN or no /dev/net/tun: TAPs cannot be made")
    assert ended.returncode == 0, ended.stdout + ended.stderr
