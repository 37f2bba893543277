"""The pytest plugin with real microVMs, in a pytest run of its own."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest

pytest_plugins = "pytester"

HELLO = "putc 'h'\nputc 'i'\n1: jmp 1b"

TESTS = """
import asyncio
import os
import pytest
import avmm

GUEST = dict(memory="3M", cmdline="")


def kvm_files():
    names = (os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))
    return [name for name in names if "kvm" in name]


@pytest.mark.microvm(**GUEST)
async def test_fails_while_two_run(microvm):
    vm = await microvm()
    await vm.console.expect(b"hi", timeout=60)
    await microvm()
    assert vm.state is avmm.State.PAUSED


async def test_ends_by_a_timeout(microvm):
    vm = await microvm(**GUEST)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await vm.wait()


def test_nothing_is_left_of_those_before():
    assert kvm_files() == []
"""


@pytest.mark.slow
def test_tests_of_a_user(pytester: pytest.Pytester, tiny_guest: Callable[[str], Path]) -> None:
    kernel = tiny_guest(HELLO)
    pytester.makeini(
        "[pytest]\naddopts = -p no:cacheprovider\nasyncio_mode = auto\nfilterwarnings = error\n"
        f"asyncio_default_fixture_loop_scope = function\navmm_kernel = {kernel}\n"
    )
    pytester.makepyfile(TESTS)
    installed = entry_points(group="pytest11", name="avmm")
    result = pytester.runpytest_subprocess(*(() if installed else ("-p", "avmm.pytest_plugin")))
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        ["*Captured console of microVM 1 call*", "hi", "(running)", "*console of microVM 2 call*"]
    )
