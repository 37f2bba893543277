"""What a user gets: examples that say how they are run, and types for mypy --strict."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from style.mypy_strict import strict

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "examples").glob("*.py"))

USERS_CODE = """
import asyncio
from collections.abc import Mapping

import avmm


async def watch(vm: avmm.MicroVM) -> int:
    lost = 0
    async for event in vm.events(limit=16):
        match event:
            case avmm.EventsLost(count=count):
                lost += count
            case avmm.LinkChanged(device=device, up=up):
                text: str = device if up else ""
                print(text)
            case avmm.Ended(reason=avmm.ExitReason(kind=avmm.ExitKind.CRASH, detail=detail)):
                raise RuntimeError(detail)
            case _:
                moment: float = event.at_s
                print(moment)
    return lost


async def main() -> None:
    config = avmm.Config(
        kernel="vmlinux",
        cpus=2,
        memory="512M",
        disks=[avmm.Disk("root.img", read_only=True)],
        nets=[avmm.Tap("tap0", host="10.0.0.1/24")],
        rng=avmm.Rng(),
    )
    try:
        async with asyncio.timeout(60), avmm.MicroVM(config) as vm:
            match = await vm.console.expect(rb"(login): ", timeout=30)
            name: bytes = match[1]
            await vm.console.write(name)
            await vm.pause()
            await vm.resume()
            vm.set_link("net0", False)
            devices: Mapping[str, avmm.DeviceStatistics] = vm.statistics().devices
            reads: int = devices["blk0"].counters["reads"]
            statistics: avmm.MachineStatistics = vm.statistics()
            vcpus: tuple[avmm.VcpuStatistics, ...] = statistics.vcpus
            print(reads, vcpus, vm.state is avmm.State.RUNNING, await watch(vm))
            reason: avmm.ExitReason = await vm.stop(grace_s=1.5)
            print(reason.kind.value)
    except avmm.HostError as error:
        print(error.kind, error.op, error.errno, error.path, error.remedy)
    except avmm.ConfigError as error:
        print(error.kind)


asyncio.run(main())
"""

WRONG_CODE = """
import avmm

config = avmm.Config(kernel=3)
events = avmm.MicroVM(avmm.Config(kernel="k")).events(limit="many")
print(avmm.ExitKind.NEVER, events)
"""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_example_says_how_it_is_run_and_a_test_runs_it(path: Path) -> None:
    usage = f"\nUsage: python examples/{path.name}"
    text = path.read_text()
    if f"{usage}\n" in text or f"{usage} KERNEL INITRD\n" in text:
        return  # tests/kvm/test_examples.py, tests/linux/test_examples.py
    assert f"{usage} " in text
    tests = (ROOT / "tests").rglob("test_*.py")
    assert any(path.stem in test.read_text() for test in tests)


@pytest.mark.slow
def test_users_code_is_clean_under_mypy_strict_and_mistakes_are_seen(tmp_path: Path) -> None:
    good, wrong = tmp_path / "good.py", tmp_path / "wrong.py"
    good.write_text(USERS_CODE)
    wrong.write_text(WRONG_CODE)
    assert strict(good, *FILES, cache=tmp_path)[0] == 0, strict(good, *FILES, cache=tmp_path)[1]
    status, told = strict(wrong, cache=tmp_path)
    assert status == 1
    assert told.count("error:") == 3, told


@pytest.mark.slow
def test_what_is_installed_says_that_it_is_typed(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    for name in ("src", "setup.py", "pyproject.toml", "README.md", "native"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = [sys.executable, "-W", "ignore", "setup.py", "-q", "egg_info", "-e", str(tmp_path)]
    command += ["build_py", "-d", str(tmp_path / "built")]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "built/avmm/py.typed").exists()
    assert (tmp_path / "built/avmm/machine/events.py").exists()
