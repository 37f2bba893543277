"""Programs whose microVMs are in worker processes: their death, and the command's."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fakes.isolated_nic import CANNOT
from fakes.tiny_driver import DRIVER

Assemble = Callable[[str], Path]

# Takes one frame, behind whose headers is text that ends in NUL.
RECEIVER = (
    DRIVER
    + """
    descriptor 0, 0x310000, 2048, 2, 0
    offer 0
    await_all
    print_answer 0x31001a
    poweroff
"""
)
SPIN = "putc 'x'\n1: jmp 1b"


def test_a_worker_ends_with_its_program(tiny_guest: Assemble) -> None:
    program = f"""
import asyncio, avmm
from avmm.machine.isolation.remote import RemoteMachine
async def main():
    config = avmm.Config(kernel={str(tiny_guest(SPIN))!r}, memory="4M", cmdline="")
    async with avmm.MicroVM(config, isolation="process") as vm:
        print(vm._machine.process.pid, flush=True)
        await vm.wait()
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pidfd = os.pidfd_open(int(process.stdout.readline()))
        process.kill()
    try:
        assert select.select([pidfd], [], [], 10)[0]
    finally:
        os.close(pidfd)


def test_the_command_isolates_a_guest(tiny_guest: Assemble, tmp_path: Path) -> None:
    guest = tiny_guest("putc 'y'\npoweroff")
    options = ["--kernel", str(guest), "--memory", "4M", "--isolate", "--stats"]
    ran = subprocess.run(
        [sys.executable, "-m", "avmm", "run", *options], capture_output=True, check=True
    )
    assert ran.stdout == b"y"
    assert json.loads(ran.stderr)["console"]["tx_bytes"] == 1
    refused = subprocess.run(
        [sys.executable, "-m", "avmm", "run", *options, "--ports", "a"], capture_output=True
    )
    assert (refused.returncode, refused.stdout) == (2, b"")
    assert b"ports: not with isolation by process" in refused.stderr


def test_root_of_a_user_namespace_isolates_a_guest(tiny_guest: Assemble) -> None:
    """As in a rootless container: it may make namespaces, but there are no users beside it."""
    inside = ["unshare", "--user", "--map-root-user"]
    if subprocess.run([*inside, "test", "-w", "/dev/kvm"]).returncode != 0:
        pytest.skip("no user namespaces, or /dev/kvm is not for the root of one")
    guest = tiny_guest("putc 'y'\npoweroff")
    options = ["--kernel", str(guest), "--memory", "4M", "--isolate"]
    command = [*inside, sys.executable, "-m", "avmm", "run", *options]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "y", "")


def test_a_nic_is_on_a_tap_that_the_program_opened(tiny_guest: Assemble) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "fakes.isolated_nic", str(tiny_guest(RECEIVER))],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    if ran.returncode == CANNOT:
        pytest.skip("no network namespace or no /dev/net/tun")
    assert (ran.returncode, ran.stdout) == (0, "by wire 1\n"), ran.stderr
