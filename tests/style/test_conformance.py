"""docs/conformance.md is what its generator prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_conformance_table_is_up_to_date() -> None:
    script = ROOT / "scripts" / "conformance.py"
    made = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert made.stdout == (ROOT / "docs" / "conformance.md").read_text(), (
        "run scripts/conformance.py > docs/conformance.md"
    )
