"""Every example that needs a stock guest, run as a user would. How one is written and what makes
it fail: CONTRIBUTING.md, Add an example."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from linux.guest import Assets, emulated_cpu

EXAMPLES = Path(__file__).parents[2] / "examples"
LIMIT_S = 300
SEVERAL_GUESTS = ("parallel_builds.py", "three_vms.py", "web_service.py")


def needing_a_guest() -> list[str]:
    """By their usage line; the others are run by tests/kvm/test_examples.py."""
    return sorted(
        path.name
        for path in EXAMPLES.glob("*.py")
        if f"\nUsage: python examples/{path.name} KERNEL INITRD\n" in path.read_text()
    )


def marked(name: str) -> object:
    """Examples with several guests at once have stood still on an emulated host (web_service and
    three_vms, now and then): they run on demand there."""
    on_demand = name in SEVERAL_GUESTS and emulated_cpu()
    return pytest.param(name, marks=[pytest.mark.variant] if on_demand else [])


@pytest.mark.parametrize("name", [marked(name) for name in needing_a_guest()])
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
