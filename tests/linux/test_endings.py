"""Every way a guest ends, each with its reason."""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
import signal
import sys
from pathlib import Path

import pytest

from avmm import Disk, ExitKind
from avmm.machine.isolation.cgroup import WorkerGroup, own_group
from linux.guest import Guests
from linux.host import assert_clean, read_from_ext4, replay_journal, wait_until_unlocked

# acpid must have the power button's input device open before the button is pressed.
READY = """
until ls -l /proc/[0-9]*/fd 2>/dev/null | grep -q input/event; do usleep 100000; done
echo READY
"""

# Each file is named when it is on the disk, by fsync(); another is being written all the time.
KEEPING = """
mkdir /kept
while :; do dd if=/dev/urandom of=/other bs=64k count=32; done 2>/dev/null &
i=0
while i=$((i + 1)); do
    dd if=/dev/urandom of=/kept/$i bs=4k count=$((i * 7 % 40 + 1)) conv=fsync 2>/dev/null
    echo "KEPT $i $(sha256sum </kept/$i | cut -d ' ' -f 1)"
done
"""


async def test_poweroff_by_the_guest(guests: Guests) -> None:
    assert (await guests.boot()).kind is ExitKind.POWEROFF


@pytest.mark.both_loops
@pytest.mark.parametrize("transport", ["pci", "mmio"])
async def test_reboot_by_the_guest(guests: Guests, transport: str) -> None:
    guest = await guests.boot(end="reboot", transport=transport, rng=True)
    assert guest.kind is ExitKind.REBOOT


async def test_kernel_panic_is_a_crash(guests: Guests) -> None:
    guest = await guests.boot(end="crash")
    assert guest.kind is ExitKind.CRASH
    assert guest.reason is not None
    assert "panic" in guest.reason.detail


async def test_triple_fault_is_a_crash(guests: Guests) -> None:
    guest = await guests.boot(end="reboot", append="reboot=t")
    assert guest.kind is ExitKind.CRASH


@pytest.mark.both_loops
async def test_stop_powers_the_guest_off_and_leaves_its_file_system_clean(
    guests: Guests, root_disk: Path
) -> None:
    script = READY + "while :; do date >>/busy; done"
    disks = [Disk(str(root_disk))]
    async with guests.running(script, disks=disks, append="root=/dev/vda") as guest:
        await guest.says("READY")
        reason = await guest.vm.stop(60)
    assert reason.kind is ExitKind.STOPPED
    assert guest.reason == reason
    assert_clean(root_disk)


async def test_stop_kills_a_guest_that_ignores_the_button(guests: Guests) -> None:
    async with guests.running("echo READY", end="hang") as guest:
        await guest.says("READY")
        reason = await guest.vm.stop(1)
    assert reason.kind is ExitKind.KILLED


async def test_kill_ends_a_busy_guest_at_once(guests: Guests) -> None:
    script = "echo READY; while :; do :; done & while :; do :; done"
    async with guests.running(script, cpus=2) as guest:
        await guest.says("READY")
        reason = await guest.vm.kill()
    assert reason.kind is ExitKind.KILLED
    assert guest.status is None


@pytest.mark.parametrize(
    "isolate", [False, pytest.param(True, marks=pytest.mark.variant)], ids=["program", "isolated"]
)
async def test_what_was_on_the_disk_is_there_when_the_monitor_is_killed(
    guests: Guests, root_disk: Path, isolate: bool
) -> None:
    config = guests.config(KEEPING, append="root=/dev/vda")
    assert config.initrd is not None
    command = [sys.executable, "-m", "avmm", "run", "--kernel", config.kernel]
    command += ["--initrd", config.initrd, "--cmdline", config.cmdline, "--disk", str(root_disk)]
    command += ["--transport", config.transport, "--ring", config.ring]
    command += ["--io-threads", str(config.io_threads), *(["--isolate"] if isolate else [])]
    kept: dict[str, str] = {}
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
    )
    enough = random.randint(10, 30)
    assert process.stdout is not None
    try:
        async for line in process.stdout:
            print(line.decode(errors="replace"), end="")
            if found := re.match(rb"KEPT (\d+) ([0-9a-f]{64})\r?\n", line):
                kept[found[1].decode()] = found[2].decode()
            if len(kept) >= enough and process.returncode is None:
                process.send_signal(signal.SIGKILL)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
    assert process.returncode == -signal.SIGKILL
    assert len(kept) >= enough
    await wait_until_unlocked(root_disk)
    own = own_group()
    for left in own.glob("avmm-*") if own is not None else ():
        await WorkerGroup(left).removed()  # nobody was left to do it
    replay_journal(root_disk)
    assert_clean(root_disk)
    found_there = {n: hashlib.sha256(read_from_ext4(root_disk, f"/kept/{n}")) for n in kept}
    assert kept == {n: digest.hexdigest() for n, digest in found_there.items()}


async def test_leaving_the_block_ends_a_guest_in_the_middle_of_its_boot(guests: Guests) -> None:
    async with guests.running(cpus=2) as guest:
        assert guest.vm.config.cpus == 2
    assert guest.kind is ExitKind.KILLED
