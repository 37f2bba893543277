"""mypy --strict as a user would run it, with avmm as it is in this tree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def strict(*paths: Path, cache: Path) -> tuple[int, str]:
    """Check files; the exit status, and what mypy said. cache: a folder for its cache."""
    pytest.importorskip("mypy", reason="mypy is not installed: pip install '.[dev]'")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", os.devnull]
    command += ["--cache-dir", str(cache), *map(str, paths)]
    environment = os.environ | {"MYPYPATH": str(ROOT / "src"), "PYTHONPATH": str(ROOT / "src")}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return ran.returncode, ran.stdout + ran.stderr
