"""virtio-blk on storage that does not answer: others go on, and an end has its bounds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fakes.hanging_fs import enter


@pytest.mark.slow
@pytest.mark.parametrize("io_threads", [0, 1], ids=["loop", "thread"])
@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_a_file_system_that_hangs(tmp_path: Path, engine: str, io_threads: int) -> None:
    """In namespaces of its own, served by a program of ours."""
    ended = subprocess.run(
        [*enter(), sys.executable, "-m", "fakes.hanging_disk", tmp_path, engine, str(io_threads)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if "disk-engine" in ended.stderr:
        pytest.skip("no io_uring here")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "an_end_leaves_it_to_itself" in ended.stdout
