"""A machine whose disk's storage does not answer: it ends all the same, and nobody else notices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fakes.hanging_fs import enter


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "io_threads"), [("io_uring", 0), ("threads", 1)])
def test_a_machine_on_a_file_system_that_hangs(
    tmp_path: Path, engine: str, io_threads: int
) -> None:
    folder = tmp_path / "mount"
    folder.mkdir()
    ended = subprocess.run(
        [*enter(), sys.executable, "-m", "fakes.hanging_machine", folder, engine, str(io_threads)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout == "done\n"
