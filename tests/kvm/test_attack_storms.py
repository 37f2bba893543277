"""Storms without end: a guest that makes them is slowed down, by counts that grow, and another in
the same process goes on with its work. What it costs that one is `avmm bench attack`."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import avmm
from kvm.attacker import (
    HANG_S,
    Device,
    attack,
    attacking,
    neighbour,
    nothing_left,
    sectors_changed,
)

pytestmark = pytest.mark.asyncio(loop_factories=["uvloop"])

PCI = Device("blk", "pci", "packed")
MMIO = Device("blk", "mmio", "split")
ON_A_THREAD = replace(PCI, io_threads=1)

DELAYED = [
    ("mmio", PCI, 4),
    ("reset", MMIO, 2),
    ("port", PCI, 4),
]
VARIANTS = [
    *(("mmio", MMIO, 2), ("reset", PCI, 2), ("stray-kick", PCI, 2)),
    *(("stray-kick", MMIO, 2), ("fault", PCI, 2), ("bar", PCI, 2), ("mask", PCI, 2)),
]
if os.environ.get("AVMM_VARIANTS"):
    DELAYED += VARIANTS

KICKS = [(PCI, 4), (replace(MMIO, io_threads=1), 2)]


SMALL = 0.01
"""A share that is overdrawn by what little a busy machine lets a storm do."""


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(HANG_S):
        for delay_s in itertools.repeat(0.001):
            if condition():
                return
            await asyncio.sleep(delay_s)


def delays(vm: avmm.MicroVM) -> int:
    return sum(vcpu.delays for vcpu in vm.statistics().vcpus)


def deaf(vm: avmm.MicroVM) -> int:
    return sum(home.deaf for home in vm.statistics().homes)


@pytest.mark.parametrize(("storm", "device", "cpus"), DELAYED)
async def test_a_storm_of_exits_is_slowed_down_and_the_neighbour_works(
    tmp_path: Path, storm: str, device: Device, cpus: int
) -> None:
    with nothing_left():
        async with (
            neighbour(tmp_path) as beside,
            attacking(tmp_path, device, "storm", cpus=cpus, storm=storm, exit_share=SMALL) as vm,
        ):
            await until(lambda: delays(vm) > 0)
            before = delays(vm)
            await beside.works()
            await until(lambda: delays(vm) > before)


async def test_a_storm_of_output_is_kept_as_far_as_there_is_room_and_the_neighbour_works(
    tmp_path: Path,
) -> None:
    with nothing_left():
        async with (
            neighbour(tmp_path) as beside,
            attacking(tmp_path, PCI, "storm", cpus=4, storm="serial") as vm,
        ):
            await until(lambda: b"#" in vm.console.scrollback)
            before = vm.statistics().console.tx_bytes
            await beside.works()
            await until(lambda: vm.statistics().console.tx_bytes > before)
            assert len(vm.console.scrollback) <= vm.config.scrollback_bytes


@pytest.mark.parametrize(("device", "cpus"), KICKS, ids=str)
async def test_a_storm_of_kicks_is_not_listened_to_and_the_neighbour_works(
    tmp_path: Path, device: Device, cpus: int
) -> None:
    with nothing_left():
        async with (
            neighbour(tmp_path) as beside,
            attacking(tmp_path, device, "storm", cpus=cpus, storm="kick") as vm,
        ):
            await until(lambda: deaf(vm) > 0)
            before = deaf(vm)
            await beside.works()
            await until(lambda: deaf(vm) > before)


async def test_with_a_share_of_one_no_exit_is_delayed(tmp_path: Path) -> None:
    async with attacking(tmp_path, PCI, "storm", storm="port", exit_share=1.0) as vm:
        await until(lambda: vm.statistics().vcpus[0].pio > 20_000)
        assert delays(vm) == 0


async def test_a_guest_that_is_delayed_can_be_paused_and_goes_on_waiting_afterwards(
    tmp_path: Path,
) -> None:
    # With so small a share a delay takes seconds, but for what interrupts it.
    async with attacking(tmp_path, PCI, "storm", storm="port", exit_share=0.001) as vm:
        await until(lambda: delays(vm) > 0)
        rounds: list[int] = []
        for _ in range(5):
            (before,) = vm.statistics().vcpus
            await vm.pause()
            await vm.resume()
            await until(lambda count=before.delays: delays(vm) > count)  # type: ignore[misc]
            rounds.append(vm.statistics().vcpus[0].pio - before.pio)
        # Had a pause waited for the delay to end, exits would come between it and the next one.
        assert 0 in rounds
        await vm.kill()


async def test_sound_work_is_neither_delayed_nor_unheard(tmp_path: Path) -> None:
    async with attacking(tmp_path, PCI, "storm", storm="requests") as vm:
        await until(lambda: vm.statistics().devices["blk0"].queues[0].used > 300)
        assert (delays(vm), deaf(vm)) == (0, 0)


@pytest.mark.parametrize("end", ["triple-fault", "nowhere"])
async def test_a_guest_that_destroys_itself_ends_alone_and_leaves_nothing(
    tmp_path: Path, end: str
) -> None:
    with nothing_left():
        async with neighbour(tmp_path):
            outcome = await attack(tmp_path, PCI, end)
    assert outcome.reason.kind in (avmm.ExitKind.CRASH, avmm.ExitKind.ERROR), outcome.reason
    assert outcome.faults == []
    assert sectors_changed(outcome.disk) == set()
