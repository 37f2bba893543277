"""Every way a guest ends, each with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from avmm import Disk, ExitKind
from linux.guest import Guests
from linux.host import assert_clean

# acpid must have the power button's input device open before the button is pressed.
READY = """
until ls -l /proc/[0-9]*/fd 2>/dev/null | grep -q input/event; do usleep 100000; done
echo READY
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


async def test_leaving_the_block_ends_a_guest_in_the_middle_of_its_boot(guests: Guests) -> None:
    async with guests.running(cpus=2) as guest:
        assert guest.vm.config.cpus == 2
    assert guest.kind is ExitKind.KILLED
