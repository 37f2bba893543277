"""docs/devices.md is what its generator prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_device_table_is_up_to_date() -> None:
    script = ROOT / "scripts" / "device_table.py"
    made = subprocess.run(
        [sys.executable, str(script)], check=True, capture_output=True, text=True
    ).stdout
    assert made == (ROOT / "docs" / "devices.md").read_text(), (
        "run scripts/device_table.py > docs/devices.md"
    )
