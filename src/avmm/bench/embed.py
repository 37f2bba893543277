"""Suite embed: what microVMs cost the program they live in.

Guests of four instructions in this process: the first writes to the console, which is how the
program knows that it ran; then they halt. How many others are alive is in a row's name. The limit
is a VM made of KVM's own calls alone, with nothing around it. And what a disk written in Python
does (python_disk.py), the streams of consoles and ports (console.py), a worker process
(isolation.py), and the guest agent (agent.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from avmm.bench import agent, console, isolation, python_disk
from avmm.bench.pss import pss_bytes
from avmm.bench.record import GOAL, LIMIT, OWN, Aim, Case
from avmm.bench.suite import Options
from avmm.bench.tiny import elf
from avmm.kvm.system import Kvm
from avmm.loop import run as run_loop
from avmm.machine.config import Config
from avmm.machine.machine import MicroVM
from avmm.mem.guest import GuestMemory
from avmm.units import MIB

SUITE = "embed"

ALIVE = (1, 10, 100, 500)
AT_ONCE = 10
FIRST_GOAL_S = 0.010
SLOWER_GOAL = 1.5
MEMORY_GOAL_BYTES = 1 * MIB

_ALONE = "avmm alone"
_MEMORY = "4M"
_DESCRIPTORS = 12
"""Of a microVM without devices, and some to spare."""
_STARTS_MIN = 5
_LIMIT_TRIES = 10

GUEST = elf(
    b"\x66\xba\xf8\x03"  # mov dx, COM1
    b"\xb0\x78"  # mov al, 'x'
    b"\xee"  # out dx, al
    b"\xfa\xf4"  # cli, hlt: for ever
)


@dataclass(slots=True)
class Figures:
    """Of one number of microVMs alive, run by run. first_s: medians, from MicroVM() to what the
    first instruction wrote. pairs_per_s: started and stopped, one after the other; at_once_per_s:
    AT_ONCE at a time. pss_bytes: of each that is alive, guest memory left out."""

    first_s: list[float]
    pairs_per_s: list[float]
    at_once_per_s: list[float]
    pss_bytes: list[float]


def cases(options: Options) -> Iterator[Case]:
    """See the suite protocol. Needs /dev/kvm."""
    yield from lives(options)
    yield from python_disk.cases(SUITE, options)
    yield from console.cases(SUITE, options)
    yield from isolated(options)
    yield from agent.cases(SUITE, options)


def lives(options: Options) -> Iterator[Case]:
    """The rows of microVMs that come and go."""
    with tempfile.TemporaryDirectory(prefix="avmm-bench-") as folder:
        path = os.path.join(folder, "guest")
        Path(path).write_bytes(GUEST)
        config = Config(kernel=path, memory=_MEMORY, cmdline="")
        limit = [_bare_s() for _ in range(options.runs)]
        alone: list[float] = []
        with _descriptors() as room:
            for alive in ALIVE:
                if alive * _DESCRIPTORS > room:
                    options.leave_out(
                        f"{SUITE} with {alive} alive: {alive * _DESCRIPTORS} open files are "
                        f"needed and {room} allowed; raise `ulimit -Hn`"
                    )
                    continue
                figures = run_loop(_measure(config, alive, options))
                alone = alone or figures.first_s
                yield from _cases(alive, figures, alone, limit)


def isolated(options: Options) -> Iterator[Case]:
    """The rows of microVMs in worker processes."""
    with tempfile.TemporaryDirectory(prefix="avmm-bench-") as folder:
        path = os.path.join(folder, "guest")
        Path(path).write_bytes(GUEST)
        yield from isolation.cases(SUITE, path, options)


def _cases(alive: int, figures: Figures, alone: list[float], limit: list[float]) -> Iterator[Case]:
    series = {OWN: figures.first_s, GOAL: [FIRST_GOAL_S], LIMIT: limit}
    aims = [Aim(GOAL, 1.0)]
    if alive > 1:
        series[_ALONE] = alone
        aims.append(Aim(_ALONE, SLOWER_GOAL))
    yield Case(SUITE, f"create to first instruction, {alive} alive", "s", "lower", series, aims)
    pairs = {OWN: figures.pairs_per_s, f"{OWN} {AT_ONCE} at once": figures.at_once_per_s}
    yield Case(SUITE, f"start and stop, {alive} alive", "VM/s", "higher", pairs)
    if alive > 1:
        memory = {OWN: figures.pss_bytes, GOAL: [float(MEMORY_GOAL_BYTES)]}
        name = f"memory of a VM without its guest's, {alive} alive"
        yield Case(SUITE, name, "B", "lower", memory, [Aim(GOAL, 1.0)])


async def _measure(config: Config, alive: int, options: Options) -> Figures:
    figures = Figures([], [], [], [])
    await _pair(config)  # what is loaded and made only once
    before = pss_bytes()
    async with _crowd(config, alive - 1):
        if alive > 1:
            figures.pss_bytes.append((pss_bytes() - before) / (alive - 1))
        for _ in range(options.runs):
            firsts: list[float] = []
            async for _ in _for(options.seconds):
                firsts.append(await _pair(config))
            figures.first_s.append(statistics.median(firsts))
            figures.pairs_per_s.append(await _rate(config, options.seconds, 1))
            figures.at_once_per_s.append(await _rate(config, options.seconds, AT_ONCE))
    return figures


@contextlib.asynccontextmanager
async def _crowd(config: Config, count: int) -> AsyncIterator[None]:
    """Others, alive and idle."""
    vms = [MicroVM(config) for _ in range(count)]
    async with AsyncExitStack() as stack:
        stack.push_async_callback(_close_all, vms)
        for vm in vms:
            await vm.start()
            await vm.console.expect(b"x")
        yield


async def _close_all(vms: list[MicroVM]) -> None:
    await asyncio.gather(*(vm.close() for vm in vms))


async def _pair(config: Config) -> float:
    """One microVM's life; seconds to its first instruction."""
    began = time.perf_counter()
    async with MicroVM(config) as vm:
        await vm.console.expect(b"x")
        return time.perf_counter() - began


async def _rate(config: Config, seconds: float, at_once: int) -> float:
    """Lives a second."""
    began, count = time.perf_counter(), 0

    async def live() -> None:
        nonlocal count
        async for _ in _for(seconds / 2):
            await _pair(config)
            count += 1

    await asyncio.gather(*(live() for _ in range(at_once)))
    return count / (time.perf_counter() - began)


async def _for(seconds: float) -> AsyncIterator[None]:
    """Turns for so long, and a few at least."""
    end, turns = time.perf_counter() + seconds, 0
    while turns < _STARTS_MIN or time.perf_counter() < end:
        yield
        turns += 1


def _bare_s() -> float:
    """Seconds of KVM's own part in the making of a VM, the median of some."""
    return statistics.median(_bare_once_s() for _ in range(_LIMIT_TRIES))


def _bare_once_s() -> float:
    kvm = Kvm.open()
    memory = GuestMemory.create(4 * MIB)
    began = time.perf_counter()
    vm = kvm.create_vm()
    try:
        for slot, region in enumerate(memory.regions):
            vm.set_memory(slot, region.gpa, region.size_bytes, region.hva)
        vm.create_irqchip()
        vm.create_pit()
        kvm.supported_cpuid()
        vcpu = vm.create_vcpu(0)
        taken = time.perf_counter() - began
        vcpu.close()
    finally:
        vm.close()
        kvm.close()
        memory.close()
    return taken


@contextlib.contextmanager
def _descriptors() -> Iterator[int]:
    """As many open files as this process may have; how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        yield hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
