"""Homes: queues served by a native thread or by the loop, and coming to rest on both."""

from __future__ import annotations

import asyncio
import os
import resource
import threading
import time

import pytest

from avmm.errors import HostError
from avmm.native import lib
from avmm.virtio.devices.rng import Rng, RngDevice, build
from avmm.virtio.home import Homes
from avmm.virtio.queue import NO_FAULT
from avmm.virtio.state import DEVICE_NEEDS_RESET
from avmm.virtio.transport import mmio
from fakes.driver_queue import Segment
from fakes.mmio_driver import eventually, settle
from fakes.virtio_rig import DATA_GPA, Rig, virtio_rig

HANG_S = 20
BUFFER_BYTES = 64

on_both_homes = pytest.mark.parametrize("io_threads", [0, 1], ids=["loop", "thread"])


def offer(rig: Rig[RngDevice], count: int = 1) -> None:
    for at in range(count):
        segment = Segment(DATA_GPA + BUFFER_BYTES * at, BUFFER_BYTES, writable=True)
        rig.driver.queues[0].offer(segment)


def take_used_without_the_loop(rig: Rig[RngDevice], count: int) -> int:
    """How many of `count` chains came back while the loop was kept from running."""
    deadline = time.monotonic() + HANG_S
    taken = 0
    while taken < count and time.monotonic() < deadline:
        taken += len(rig.driver.queues[0].take_used())
        os.sched_yield()
    return taken


async def test_a_blocked_loop_does_not_stall_a_device_that_has_a_thread() -> None:
    async with virtio_rig(lambda context: build(Rng(), context), io_threads=1) as rig:
        await rig.driver.start()
        for _ in range(100):
            offer(rig)
            rig.driver.kick(0)
            assert take_used_without_the_loop(rig, 1) == 1


async def test_a_device_that_asks_for_the_loop_is_not_on_a_thread() -> None:
    async with virtio_rig(lambda context: build(Rng(home="loop"), context), io_threads=1) as rig:
        await rig.driver.start()
        offer(rig)
        rig.driver.kick(0)
        await rig.driver.used(0)
        loop, thread = rig.device.context.homes.statistics()
        assert loop.runs > 0
        assert thread.runs == 0


async def test_a_thread_with_nothing_to_do_sleeps() -> None:
    async with virtio_rig(lambda context: build(Rng(), context), io_threads=1) as rig:
        await rig.driver.start()
        offer(rig)
        rig.driver.kick(0)
        await rig.driver.used(0)
        homes = rig.device.context.homes
        await eventually(lambda: homes.statistics()[1].sleeps > 0)
        runs = homes.statistics()[1].runs
        for _ in range(1000):
            await asyncio.sleep(0)
        assert homes.statistics()[1].runs == runs


@on_both_homes
async def test_rest_and_work_alternate_under_a_storm_of_kicks(io_threads: int) -> None:
    async with virtio_rig(lambda context: build(Rng(), context), io_threads=io_threads) as rig:
        await rig.driver.start(size=64)
        kick_fd = rig.device.queues[0].kick_fd
        over = threading.Event()

        def storm() -> None:
            while not over.is_set():
                os.eventfd_write(kick_fd, 1)

        thread = threading.Thread(target=storm)
        thread.start()
        try:
            for _ in range(50):
                offer(rig, 16)
                await rig.device.quiesce()
                at_rest = rig.device.statistics().queues[0].chains
                offer(rig, 16)
                await asyncio.sleep(0)
                assert rig.device.statistics().queues[0].chains == at_rest
                await rig.device.resume()
                await rig.driver.used(0, 32)
        finally:
            over.set()
            thread.join()
        assert rig.device.statistics().queues[0].used == 50 * 32


@on_both_homes
async def test_a_fault_is_reported_and_a_reset_mends_it(io_threads: int) -> None:
    async with virtio_rig(lambda context: build(Rng(), context), io_threads=io_threads) as rig:
        await rig.driver.start()
        kind = rig.driver.queues[0].offer_broken()
        rig.driver.kick(0)
        await eventually(lambda: rig.device.statistics().faults == 1)
        assert rig.device.statistics().last_fault == kind
        assert rig.driver.read(mmio.STATUS) & DEVICE_NEEDS_RESET
        await rig.driver.start()
        offer(rig)
        rig.driver.kick(0)
        await rig.driver.used(0)


@on_both_homes
async def test_chains_offered_at_rest_are_taken_when_work_goes_on(io_threads: int) -> None:
    async with virtio_rig(lambda context: build(Rng(), context), io_threads=io_threads) as rig:
        await rig.driver.start()
        await rig.device.quiesce()
        offer(rig)
        await rig.device.resume()
        await rig.driver.used(0)


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


async def test_homes_that_cannot_all_be_made_leave_nothing() -> None:
    loop = asyncio.get_running_loop()
    Homes.create(loop, threads=1).close()
    before, threads = open_fds(), set(os.listdir("/proc/self/task"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for spare in range(12):
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(before) + spare, hard))
        try:
            with pytest.raises(HostError) as caught:
                Homes.create(loop, threads=6)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert caught.value.kind == "home"
        assert open_fds() == before
        # One that has been joined may still be there for a moment.
        await eventually(lambda: set(os.listdir("/proc/self/task")) <= threads)


async def test_threads_take_turns_and_a_closed_home_keeps_its_counters() -> None:
    homes = Homes.create(asyncio.get_running_loop(), threads=2, poll_us=10)
    names = [homes.pick("auto").name for _ in range(4)]
    assert names == ["io0", "io1", "io0", "io1"]
    assert homes.pick("loop").name == "loop"
    homes.close()
    assert [home.name for home in homes.statistics()] == ["loop", "io0", "io1"]


@on_both_homes
async def test_a_reset_forgets_a_fault_that_the_loop_has_not_heard_of(io_threads: int) -> None:
    async with virtio_rig(lambda context: build(Rng(), context), io_threads=io_threads) as rig:
        await rig.driver.start()
        queue, home = rig.device.queues[0], rig.device.context.homes.all[-1]
        rig.driver.queues[0].offer(Segment(1 << 40, BUFFER_BYTES, writable=True))
        rig.driver.kick(0)
        while queue.fault == NO_FAULT:  # without a turn of the loop
            if io_threads == 0:
                lib.av_home_turn(home.native)
        await rig.driver.set_status(0)
        await settle()
        assert rig.driver.status() == 0
        assert rig.device.statistics().last_fault == "bad-gpa"
