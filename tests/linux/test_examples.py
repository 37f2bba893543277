"""Every example that needs a stock guest, run as a user would. How one is written and what makes
it fail: CONTRIBUTING.md, Add an example."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from linux.guest import Assets

EXAMPLES = Path(__file__).parents[2] / "examples"
LIMIT_S = 300


def needing_a_guest() -> list[str]:
    """By their usage line; the others are run by tests/kvm/test_examples.py."""
    return sorted(
        path.name
        for path in EXAMPLES.glob("*.py")
        if f"\nUsage: python examples/{path.name} KERNEL INITRD\n" in path.read_text()
    )


@pytest.mark.parametrize("name", needing_a_guest())
async def test_example(assets: Assets, tmp_path: Path, name: str) -> None:
    kernel, initrd = assets.kernel("cloud", "vmlinux"), assets.initrd("cloud")
    command = (sys.executable, "-W", "error", str(EXAMPLES / name), str(kernel), str(initrd))
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=tmp_path,
    )
    try:
        async with asyncio.timeout(LIMIT_S):
            output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    print(output.decode())
    assert (process.returncode, errors.decode()) == (0, "")
    assert output
