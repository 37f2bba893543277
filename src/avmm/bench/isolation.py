"""Rows of suite embed: what a worker process of its own costs a microVM.

Start and memory are of embed's guest of four instructions. Reads are of 512 bytes from the page
cache. The guest has four in flight, polls, and asks for more when it has them all: so four pay once
for all there is between a guest and its file.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from avmm.bench.attacker import MEMORY_BYTES, PROGRAM, check_program, command_line
from avmm.bench.pss import pss_bytes
from avmm.bench.record import OWN, Case
from avmm.bench.suite import Options
from avmm.loop import run as run_loop
from avmm.machine.config import Config
from avmm.machine.isolation.remote import RemoteMachine
from avmm.machine.machine import MicroVM
from avmm.virtio.devices.blk import Disk

ISOLATED = f"{OWN} isolated"
_STARTS = 9
_DISK_BYTES = 64 * 512

Isolation = Literal["process"] | None
SERIES: tuple[tuple[str, Isolation], ...] = ((OWN, None), (ISOLATED, "process"))


def cases(suite: str, kernel: str, options: Options) -> Iterator[Case]:
    """The rows. kernel: embed's."""
    config = Config(kernel=kernel, memory="4M", cmdline="")
    starts: dict[str, list[float]] = {name: [] for name, _ in SERIES}
    for _ in range(options.runs):
        for name, isolation in SERIES:
            starts[name].append(run_loop(_start_s(config, isolation)))
    yield Case(suite, "create to first instruction, in a worker", "s", "lower", starts)
    memory = {ISOLATED: [run_loop(_worker_bytes(config)) for _ in range(options.runs)]}
    yield Case(suite, "memory of a worker without its guest's", "B", "lower", memory)
    check_program()
    with tempfile.TemporaryDirectory(prefix="avmm-bench-") as folder:
        image = Path(folder, "disk")
        image.write_bytes(bytes(_DISK_BYTES))
        for threads in (0, 1):
            rates: dict[str, list[float]] = {name: [] for name, _ in SERIES}
            for _ in range(options.runs):
                for name, isolation in SERIES:
                    work = _requests_per_s(str(image), threads, isolation, options.seconds)
                    rates[name].append(run_loop(work))
            served = f"{threads} I/O threads" if threads else "the loop"
            row = f"a guest's reads of a disk in a worker, by {served}"
            yield Case(suite, row, "IOPS", "higher", rates)


async def _start_s(config: Config, isolation: Isolation) -> float:
    """The median of some starts, behind one that is not counted."""
    taken: list[float] = []
    for _ in range(1 + _STARTS):
        began = time.perf_counter()
        async with MicroVM(config, isolation=isolation) as vm:
            await vm.console.expect(b"x")
            taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


async def _worker_bytes(config: Config) -> float:
    async with MicroVM(config, isolation="process") as vm:
        await vm.console.expect(b"x")
        machine = vm._machine
        assert isinstance(machine, RemoteMachine)
        return float(pss_bytes(str(machine.process.pid)))


async def _requests_per_s(
    image: str, io_threads: int, isolation: Isolation, seconds: float
) -> float:
    config = Config(
        kernel=os.fspath(PROGRAM),
        memory=MEMORY_BYTES,
        cmdline=command_line("load", kind="blk", transport="pci"),
        disks=[Disk(image)],
        io_threads=io_threads,
    )
    async with MicroVM(config, isolation=isolation) as vm:
        while True:
            before, began = await _done(vm), time.perf_counter()
            await asyncio.sleep(seconds)
            after, ended = await _done(vm), time.perf_counter()
            if before:  # it was on its way already
                return (after - before) / (ended - began)


async def _done(vm: MicroVM) -> int:
    """Requests so far: a pause brings exact counters, from a worker too."""
    await vm.pause()
    counters = vm.statistics().devices["blk0"].counters
    await vm.resume()
    return counters["reads"] + counters["writes"]
