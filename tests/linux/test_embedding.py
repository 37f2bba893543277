"""A stock guest in a user's program that changes its mind."""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path

import avmm
from linux.guest import Guests
from linux.holdings import Holdings

MOMENTS = 20


async def test_cancelled_at_random_moments_of_its_start_it_leaves_nothing(
    guests: Guests, root_disk: Path
) -> None:
    """From before the first step to the guest's user space; AVMM_SEED repeats a run."""
    seed = int(os.environ.get("AVMM_SEED") or time.time_ns() % 1_000_000)
    print(f"AVMM_SEED={seed}")
    dice = random.Random(seed)
    config = guests.config(
        cpus=2,
        disks=[avmm.Disk(str(root_disk))],
        nets=[avmm.Tap("avmmcancel0", host="10.99.0.1/24")],
        rng=True,
        io_threads=1,
        append="root=/dev/vda",
    )

    async def live(started: asyncio.Event) -> None:
        async with avmm.MicroVM(config) as vm:
            started.set()
            await vm.console.expect(b"AVMM-GUEST: userspace", timeout=300)

    began = time.monotonic()
    await live(asyncio.Event())
    whole_s = time.monotonic() - began
    before = Holdings.now()
    started_count = 0
    for number in range(MOMENTS):
        # Most of them in the first tenth: that is where the machine is built.
        after_s = dice.uniform(0, whole_s / 10 if number % 4 else whole_s)
        started = asyncio.Event()
        task = asyncio.create_task(live(started))
        await asyncio.wait([task], timeout=after_s)
        task.cancel()
        await asyncio.wait([task])
        started_count += started.is_set()
        assert task.cancelled() or task.exception() is None
        left = Holdings.now().beyond(before)
        assert not left, f"cancelled after {after_s:.4f} s: {left}"
    print(f"{started_count} of {MOMENTS} were cancelled while the guest ran")
