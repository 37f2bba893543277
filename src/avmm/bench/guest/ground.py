"""What the rows need of the host: a disk of no cost, TAPs, the servers at the other end.

Root only. Everything is taken away on the way out.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from avmm.bench.guest.contenders import Machine
from avmm.bench.guest.kit import Kit
from avmm.bench.guest.rows import DROP_PORT, ECHO_PORT, HOST, PPS_PORT, PREFIX, ZERO_PORT
from avmm.errors import HostError

NULL_BLK = ("queue_mode=2", "irqmode=0", "memory_backed=0", "gb=4")
"""Completes at once, in the submitter's context, and keeps nothing."""
RESULTS_BYTES = 4 << 20
_DEBUGFS = Path("/sys/kernel/debug")


@contextlib.contextmanager
def null_disk() -> Iterator[Path]:
    """A block device that costs nothing. HostError when null_blk cannot be loaded."""
    device = Path("/dev/nullb0")
    if device.exists():
        raise HostError("bench-disk", op=f"{device} is in use", remedy="modprobe -r null_blk")
    run("modprobe", "null_blk", *NULL_BLK)
    try:
        yield device
    finally:
        run("modprobe", "-r", "null_blk")


@contextlib.contextmanager
def results_disk() -> Iterator[Path]:
    """An image that takes a guest's report, known to it by its size."""
    with tempfile.TemporaryDirectory(prefix="avmm-bench.") as folder:
        path = Path(folder) / "results.img"
        clear(path)
        yield path


def clear(path: Path) -> None:
    """Empty the results disk for the next guest."""
    with path.open("wb") as file:
        file.truncate(RESULTS_BYTES)


@contextlib.contextmanager
def tap(name: str, address: str = f"{HOST}/{PREFIX}") -> Iterator[str]:
    """A TAP that is up. It stays while contenders come and go, so none of them makes it."""
    run("ip", "tuntap", "add", "dev", name, "mode", "tap")
    try:
        run("ip", "address", "add", address, "dev", name)
        run("ip", "link", "set", name, "up")
        yield name
    finally:
        run("ip", "link", "delete", name)


@contextlib.contextmanager
def servers(kit: Kit, machine: Machine) -> Iterator[None]:
    """What the guest's programs talk to. Started for each guest: one that hangs keeps them busy."""
    with contextlib.ExitStack() as stack:
        if machine.taps:
            for command in (kit.iperf3("--server"), kit.pps("serve", str(PPS_PORT))):
                stack.enter_context(_server(command))
        if machine.vsock is not None:
            # Both kinds of hosts' ends at once, whichever this contender has.
            for environment in ({}, {"VSOCK_UNIX": str(machine.vsock)}):
                for port, what in ((DROP_PORT, "drop"), (ZERO_PORT, "zero"), (ECHO_PORT, "echo")):
                    command = kit.vsock("serve", str(port), what)
                    stack.enter_context(_server(command, environment))
        yield


@contextlib.contextmanager
def _server(command: list[str], environment: dict[str, str] | None = None) -> Iterator[None]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, **(environment or {})},
    )
    with process:
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def vsock_path() -> Iterator[Path]:
    """Where the unix sockets of vsock go; the kernel's own host end is there too from now on."""
    run("modprobe", "vhost_vsock")
    with tempfile.TemporaryDirectory(prefix="avmm-bench.") as folder:
        yield Path(folder) / "vsock"


@contextlib.contextmanager
def exit_counts() -> Iterator[None]:
    """KVM's counters, where they can be mounted: in a namespace they may not be."""
    ours = False
    if not os.path.ismount(_DEBUGFS):
        with contextlib.suppress(HostError):
            run("mount", "-t", "debugfs", "debugfs", str(_DEBUGFS))
            ours = True
    try:
        yield
    finally:
        if ours:
            run("umount", str(_DEBUGFS))


def run(*command: str) -> None:
    """Run a command of the host. HostError("bench-host") says what it said."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as e:
        raise HostError("bench-host", op="Start of", path=command[0], errno=e.errno) from e
    if done.returncode:
        raise HostError("bench-host", op=" ".join(command), remedy=done.stderr.strip() or None)
