"""A program whose microVMs live under signals, stops and jumps of the clock.

python -m fakes.disturbed KERNEL LOOP FOLDER, on a failing_host: the guest writes a byte and waits
for its power button. A line is printed at each step of a life, when whoever reads may stop the
program and let it go on. Signals come all the time, and the clock jumps by a year at each step.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from types import FrameType

import uvloop

import avmm
from linux.holdings import Holdings

LIVES = 4
EVERY_S = 0.0005
YEAR_S = 365 * 86400

came: Counter[int] = Counter()
jumps = itertools.cycle((YEAR_S, -YEAR_S, 0))


def on_alarm(number: int, frame: FrameType | None) -> None:
    came[number] += 1
    os.kill(os.getpid(), signal.SIGCHLD if came[number] % 2 else signal.SIGUSR1)


def on_signal(number: int, frame: FrameType | None) -> None:
    came[number] += 1


def step(name: str) -> None:
    """Let the clock jump, and whoever reads disturb us."""
    offset = next(jumps)
    before = time.time()
    ctypes.CDLL(None).failing_host_set_clock(ctypes.c_long(offset))
    assert abs(time.time() - before) > YEAR_S / 2
    print(name, flush=True)


async def live(config: avmm.Config) -> None:
    async with avmm.MicroVM(config) as vm:
        step("started")
        await vm.serial.expect(b"x", timeout=60)
        await vm.pause()
        step("paused")
        await vm.resume()
        step("resumed")
        assert (await vm.stop(60)).kind is avmm.ExitKind.STOPPED
    step("ended")


async def main(kernel: str, folder: Path) -> None:
    image = folder / "disk.img"
    image.write_bytes(bytes(4096))
    config = avmm.Config(
        kernel=kernel,
        memory="3M",
        cmdline="",
        cpus=2,
        disks=[avmm.Disk(str(image), engine="threads")],
        nets=[avmm.Nic()],
        io_threads=1,
    )
    await live(config)
    before = Holdings.now()
    for _ in range(LIVES):
        await live(config)
    assert Holdings.now().beyond(before) == {}
    assert min(came[each] for each in (signal.SIGALRM, signal.SIGUSR1, signal.SIGCHLD)) > 0


if __name__ == "__main__":
    _, kernel, loop, folder = sys.argv
    signal.signal(signal.SIGALRM, on_alarm)
    for each in (signal.SIGUSR1, signal.SIGCHLD):
        signal.signal(each, on_signal)
    signal.setitimer(signal.ITIMER_REAL, EVERY_S, EVERY_S)
    factory = uvloop.new_event_loop if loop == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main(kernel, Path(folder)))
    signal.setitimer(signal.ITIMER_REAL, 0)  # at its end Python gives its handlers back
