"""vCPUs that get in each other's way: whatever the device does then, nothing outside of what they
gave it is touched, and it works after a reset."""

from __future__ import annotations

from pathlib import Path

import pytest

import avmm
from kvm.attacker import (
    ATTACKED,
    WORKED_ON,
    Device,
    attack,
    neighbour,
    nothing_left,
    sectors_changed,
)

EXPECTED = {
    "scribbled-rings": "works",
    "reset-in-flight": "quiet",
    "reset-in-flight, after": "works",
    "status-of-many": "works",
    "setup-of-many": "works",
    "kick-storm": "works",
    "device": "works",
    "guards": "whole",
}
EXPECTED_OF_PCI = {"mask-storm": "works", "hidden-bar": "works"}

RACES = [
    (Device("blk", "pci", "split", engine="threads"), 2),
    (Device("blk", "mmio", "packed", write=True), 4),
    (Device("blk", "pci", "packed", io_threads=1), 2),
    (Device("net", "pci", "packed", 0), 2),
    (Device("net", "pci", "split", 1, io_threads=1), 2),
    (Device("vsock", "pci", "split", 0), 2),
]


async def race(folder: Path, device: Device, cpus: int) -> None:
    with nothing_left():
        async with neighbour(folder):
            outcome = await attack(folder, device, "races", cpus=cpus)
    expected = EXPECTED | (EXPECTED_OF_PCI if device.transport == "pci" else {})
    assert outcome.said == expected
    assert outcome.reason.kind is avmm.ExitKind.POWEROFF
    may = {WORKED_ON, ATTACKED} if device.write else {WORKED_ON}
    assert sectors_changed(outcome.disk) <= may


@pytest.mark.asyncio(loop_factories=["uvloop"])
@pytest.mark.parametrize(("device", "cpus"), RACES, ids=str)
async def test_races_of_vcpus_break_nothing_but_the_device_they_race_for(
    tmp_path: Path, device: Device, cpus: int
) -> None:
    await race(tmp_path, device, cpus)


@pytest.mark.parametrize("ring", ["split", "packed"])
@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_they_do_neither_on_asyncios_own_loop(tmp_path: Path, ring: str) -> None:
    await race(tmp_path, Device("vsock", "mmio", ring, 1), 2)
