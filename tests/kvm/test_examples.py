"""Every example that needs no stock guest, run as a user would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def needing_no_guest() -> list[str]:
    """By their usage line; the others are run by tests/linux/test_examples.py."""
    return sorted(
        path.name
        for path in EXAMPLES.glob("*.py")
        if f"\nUsage: python examples/{path.name}\n" in path.read_text()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", needing_no_guest())
def test_example(name: str) -> None:
    command = [sys.executable, "-W", "error", str(EXAMPLES / name)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout
