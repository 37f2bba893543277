"""Kicks that bring no work: what is free, what work earns, and who is not listened to."""

from __future__ import annotations

import asyncio
import os

import pytest

from avmm.kicks import Kicks
from avmm.native import CData, ffi, lib
from avmm.virtio.devices import console
from avmm.virtio.devices.console import VirtioConsole
from avmm.virtio.devices.rng import Rng, RngDevice, build
from avmm.virtio.home import HomeStatistics
from fakes.driver_queue import Segment
from fakes.mmio_driver import eventually, settle
from fakes.virtio_rig import DATA_GPA, Rig, virtio_rig

BURST = 64
A_SECOND = 100
DEAF_NS = 4_000_000
SECOND_NS = 10**9
FREE = 8

on_both_homes = pytest.mark.parametrize("io_threads", [0, 1], ids=["loop", "thread"])


def new() -> CData:
    kicks = ffi.new("struct av_kicks *")
    lib.av_kicks_init(kicks, 0, 0, 0)
    return kicks


def vain(kicks: CData, count: int, now_ns: int = 0) -> int:
    """How many of so many were too many."""
    return sum(lib.av_kicks_vain(kicks, now_ns) == DEAF_NS for _ in range(count))


def test_some_kicks_in_vain_are_free_and_come_back_with_time() -> None:
    kicks = new()
    assert vain(kicks, BURST) == 0
    assert vain(kicks, 3) == 3
    assert vain(kicks, 10, 10 * SECOND_NS // A_SECOND) == 0
    assert vain(kicks, 1, 10 * SECOND_NS // A_SECOND) == 1
    assert (kicks.vain, kicks.deaf) == (BURST + 14, 4)


def test_a_chain_earns_two_and_no_more_than_there_may_be() -> None:
    kicks = new()
    for _ in range(1000):
        lib.av_kicks_worked(kicks, 1)
    assert vain(kicks, BURST + 1) == 1
    lib.av_kicks_worked(kicks, 1)
    assert vain(kicks, 3) == 1
    lib.av_kicks_worked(kicks, 3)
    assert vain(kicks, 7) == 1
    lib.av_kicks_worked(kicks, 2**64 - 1)
    assert vain(kicks, BURST + 1) == 1


def test_a_driver_whose_every_request_is_kicked_twice_too_often_is_heard_for_ever() -> None:
    kicks = new()
    for _ in range(10 * BURST):
        lib.av_kicks_worked(kicks, 1)
        assert vain(kicks, 2) == 0


def home(rig: Rig[RngDevice]) -> HomeStatistics:
    return rig.device.context.homes.statistics()[-1]


def few_are_free(rig: Rig[RngDevice]) -> None:
    """So that a machine that is too busy to kick often comes to the end of them too."""
    for each in rig.device.context.homes.all:
        lib.av_home_limit_kicks(each.native, 1, FREE)


async def kick_until_deaf(rig: Rig[RngDevice], times: int) -> None:
    async with asyncio.timeout(20):
        while home(rig).deaf < times:
            rig.driver.kick(0)
            os.sched_yield()
            await asyncio.sleep(0)


@on_both_homes
async def test_a_lane_kicked_in_vain_goes_deaf_and_serves_what_comes_meanwhile(
    io_threads: int,
) -> None:
    async with virtio_rig(lambda context: build(Rng(), context), io_threads=io_threads) as rig:
        await rig.driver.start()
        few_are_free(rig)
        await kick_until_deaf(rig, 1)
        assert home(rig).vain_kicks > FREE
        for _ in range(3):
            rig.driver.queues[0].offer(Segment(DATA_GPA, 64, writable=True))
            rig.driver.kick(0)
            await rig.driver.used(0)
        await kick_until_deaf(rig, home(rig).deaf + 2)


@on_both_homes
async def test_a_lane_that_has_work_for_every_kick_is_never_deaf(io_threads: int) -> None:
    async with virtio_rig(lambda context: build(Rng(), context), io_threads=io_threads) as rig:
        await rig.driver.start()
        few_are_free(rig)
        for _ in range(10 * FREE):
            rig.driver.queues[0].offer(Segment(DATA_GPA, 64, writable=True))
            rig.driver.kick(0)
            rig.driver.kick(0)
            await rig.driver.used(0)
        assert home(rig).deaf == 0


@on_both_homes
async def test_a_guest_that_kicks_no_more_is_listened_to_after_once(io_threads: int) -> None:
    async with virtio_rig(lambda context: build(Rng(), context), io_threads=io_threads) as rig:
        await rig.driver.start()
        few_are_free(rig)

        def others() -> int:
            """Runs for another reason than a kick."""
            return home(rig).runs - home(rig).vain_kicks

        await eventually(lambda: others() > 0)
        first = others()
        await kick_until_deaf(rig, 1)
        # It looks at its ring, and then at what epoll has to say of the kicks of before.
        await eventually(lambda: others() >= first + 2)
        assert home(rig).deaf == 1


@on_both_homes
async def test_a_deaf_lane_rests_and_begins_anew(io_threads: int) -> None:
    async with virtio_rig(lambda context: build(Rng(), context), io_threads=io_threads) as rig:
        await rig.driver.start()
        few_are_free(rig)
        await kick_until_deaf(rig, 1)
        await rig.driver.start()  # resets it first
        rig.driver.queues[0].offer(Segment(DATA_GPA, 64, writable=True))
        rig.driver.kick(0)
        await rig.driver.used(0)


async def test_a_queue_that_python_serves_has_work_when_chains_were_taken_off_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judged: list[bool] = []

    def judge(kicks: Kicks, worked: bool) -> float:
        judged.append(worked)
        return 0.0

    monkeypatch.setattr(Kicks, "judge", judge)
    async with virtio_rig(lambda context: console.build(VirtioConsole(), context)) as rig:
        await rig.driver.start()
        await settle()
        judged.clear()
        for _ in range(3):
            rig.driver.kick(console.TX)
            await settle()
        rig.driver.queues[console.TX].offer(Segment(DATA_GPA, 64))
        rig.driver.kick(console.TX)
        await rig.driver.used(console.TX)
        # Room for input of which there is none is not work either.
        rig.driver.queues[console.RX].offer(Segment(DATA_GPA, 64, writable=True))
        for _ in range(3):
            rig.driver.kick(console.RX)
            await settle()
    assert judged == [False] * 3 + [True] + [False] * 3


async def test_it_rests_when_it_is_kicked_for_nothing_and_serves_what_came_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rests: list[float] = [0.0, 1e-6]

    def judge(kicks: Kicks, worked: bool) -> float:
        return 0.0 if worked or not rests else rests.pop()

    monkeypatch.setattr(Kicks, "judge", judge)
    async with virtio_rig(lambda context: console.build(VirtioConsole(), context)) as rig:
        await rig.driver.start()
        rig.driver.kick(console.TX)
        await eventually(lambda: not rests)
        rig.driver.queues[console.TX].offer(Segment(DATA_GPA, 64))
        rig.driver.kick(console.TX)
        await rig.driver.used(console.TX)


def test_a_guest_is_judged_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0]
    monkeypatch.setattr("avmm.kicks.time.monotonic_ns", lambda: now[0])
    kicks = Kicks()
    assert [kicks.judge(False) for _ in range(BURST + 1)] == [0.0] * BURST + [0.004]
    assert kicks.judge(True) == 0.0
    assert [kicks.judge(False) for _ in range(3)] == [0.0, 0.0, 0.004]
    now[0] = SECOND_NS // A_SECOND
    assert [kicks.judge(False) for _ in range(2)] == [0.0, 0.004]
