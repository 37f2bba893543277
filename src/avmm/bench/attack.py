"""Suite attack: what a guest that storms its machine costs another in the same process.

The neighbour writes and reads a disk, one request at a time, on the same event loop. It is
measured alone, beside a guest whose vCPUs spin, and beside that guest storming: what spinning
takes is the host's scheduler's business, so that is what a storm is held against. How late the
loop is with a timer is measured along with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from avmm.bench.attacker import MEMORY_BYTES, PROGRAM, check_program, command_line
from avmm.bench.record import OWN, Aim, Case
from avmm.bench.suite import Options
from avmm.loop import run as run_loop
from avmm.machine.config import Config
from avmm.machine.machine import MicroVM
from avmm.units import SECTOR_BYTES
from avmm.virtio.devices.blk import Disk

SUITE = "attack"

CPUS = 4
SHARE_AIM = 0.8
SPINNING = "avmm spinning"
ALONE = "avmm alone"

_DISK_SECTORS = 64
_TICK_S = 0.002

Transport = Literal["pci", "mmio"]


@dataclass(frozen=True, slots=True)
class Storm:
    """name: in native/attacker/storms.c. kind: the device's. aims: whether its row has one:
    requests that are sound are work, of which a guest may have as much as it gets."""

    name: str
    what: str
    transport: Transport = "pci"
    kind: Literal["blk", "vsock"] = "blk"
    aims: bool = True


STORMS = (
    Storm("kick", "kicks without requests"),
    Storm("kick", "kicks without requests, virtio-mmio", "mmio"),
    Storm("kick", "kicks without requests, vsock", kind="vsock"),
    Storm("stray-kick", "kicks of no queue"),
    Storm("unassigned", "writes to no port"),
    Storm("port", "port reads answered in Python"),
    Storm("mmio", "register reads answered in Python"),
    Storm("mmio", "register reads answered in Python, virtio-mmio", "mmio"),
    Storm("reset", "resets"),
    Storm("fault", "broken rings and resets"),
    Storm("bar", "a BAR that comes and goes"),
    Storm("mask", "MSI-X masks"),
    Storm("serial", "serial output"),
    Storm("requests", "sound requests", aims=False),
)

_SPIN = Storm("spin", "")


@dataclass(slots=True)
class Figures:
    """Run by run: the neighbour's requests a second, and the most that the loop was late, in
    seconds."""

    rate: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)

    def add(self, rate: float, late_s: float) -> None:
        """One run more."""
        self.rate.append(rate)
        self.late_s.append(late_s)


def cases(options: Options) -> Iterator[Case]:
    """See the suite protocol. Needs /dev/kvm."""
    check_program()
    with tempfile.TemporaryDirectory(prefix="avmm-bench-") as folder:
        for storm in STORMS:
            alone, spinning, storming = Figures(), Figures(), Figures()
            for _ in range(options.runs):
                alone.add(*run_loop(measure(Path(folder), None, options.seconds)))
                spinning.add(*run_loop(measure(Path(folder), _SPIN, options.seconds)))
                storming.add(*run_loop(measure(Path(folder), storm, options.seconds)))
            series = {OWN: storming.rate, SPINNING: spinning.rate, ALONE: alone.rate}
            aims = [Aim(SPINNING, SHARE_AIM)] if storm.aims else []
            yield Case(SUITE, f"neighbour beside {storm.what}", "req/s", "higher", series, aims)
            series = {OWN: storming.late_s, SPINNING: spinning.late_s, ALONE: alone.late_s}
            yield Case(SUITE, f"loop's worst delay, {storm.what}", "s", "lower", series)


async def measure(folder: Path, storm: Storm | None, seconds: float) -> tuple[float, float]:
    """The neighbour's requests a second beside one storm, or alone, and the loop's worst delay."""
    async with contextlib.AsyncExitStack() as stack:
        neighbour = await stack.enter_async_context(MicroVM(_neighbour(folder)))
        await neighbour.console.expect(b".")
        if storm is not None:
            attacker = await stack.enter_async_context(MicroVM(attacking(folder, storm)))
            await attacker.console.expect(b"begins")
        loop = asyncio.get_running_loop()
        async with _watch() as late:
            began, before = loop.time(), _answered(neighbour)
            await asyncio.sleep(seconds)
            rate = (_answered(neighbour) - before) / (loop.time() - began)
    return rate, max(late)


def attacking(folder: Path, storm: Storm, cpus: int = CPUS) -> Config:
    """A microVM whose guest does it for ever, on all its vCPUs."""
    words = {"kind": storm.kind, "transport": storm.transport, "cpus": cpus, "storm": storm.name}
    return Config(
        kernel=str(PROGRAM),
        memory=MEMORY_BYTES,
        cmdline=command_line("storm", **words),  # type: ignore[arg-type]
        cpus=cpus,
        transport=storm.transport,
        disks=[Disk(_disk(folder, "attacker"))] if storm.kind == "blk" else [],
        vsock=storm.kind == "vsock",
    )


def _neighbour(folder: Path) -> Config:
    return Config(
        kernel=str(PROGRAM),
        memory=MEMORY_BYTES,
        cmdline=command_line("behave", kind="blk", transport="pci"),
        disks=[Disk(_disk(folder, "neighbour"))],
    )


def _disk(folder: Path, name: str) -> str:
    path = folder / name
    path.write_bytes(bytes(_DISK_SECTORS * SECTOR_BYTES))
    return str(path)


def _answered(vm: MicroVM) -> int:
    return sum(queue.used for queue in vm.statistics().devices["blk0"].queues)


@contextlib.asynccontextmanager
async def _watch() -> AsyncIterator[list[float]]:
    """Inside, how late each timer of the loop was, in seconds."""
    late = [0.0]
    loop = asyncio.get_running_loop()

    async def tick() -> None:
        while True:
            due = loop.time() + _TICK_S
            await asyncio.sleep(_TICK_S)
            late.append(loop.time() - due)

    task = asyncio.create_task(tick())
    try:
        yield late
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
