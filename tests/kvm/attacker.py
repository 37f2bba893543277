"""Runs native/attacker beside a guest that harms nobody, and tells what came of both."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import avmm
from avmm.bench.attacker import MEMORY_BYTES, PROGRAM, command_line
from avmm.units import SECTOR_BYTES
from kvm.test_machine import held

HANG_S = 60
SECTORS = 64
WORKED_ON = 7
"""The sector that sound requests write."""
ATTACKED = 3
"""That of spoilt chains, where they are whole enough to be carried out."""


@dataclass(frozen=True)
class Device:
    """What is attacked. queue: of it, whose chains are spoilt. write: chains of a disk write.
    engine: of a disk. io_threads: the machine's."""

    kind: str
    transport: str
    ring: str
    queue: int = 0
    write: bool = False
    engine: str = "auto"
    io_threads: int = 0

    def __str__(self) -> str:
        way = f"{'write' if self.write else 'read'}-{self.engine}" if self.kind == "blk" else ""
        return f"{self.kind}{way}{self.queue}-{self.transport}-{self.ring}-{self.io_threads}"

    @property
    def id(self) -> str:
        return f"{self.kind}0"


@dataclass(frozen=True)
class Outcome:
    """said: what the guest printed of each attack. faults: kinds, in order."""

    reason: avmm.ExitReason
    said: dict[str, str]
    faults: list[str]
    disk: bytes
    statistics: Any


def image() -> bytes:
    return b"".join(bytes([number]) * SECTOR_BYTES for number in range(SECTORS))


def sectors_changed(disk: bytes) -> set[int]:
    before = image()[: len(disk)]
    return {
        number
        for number in range(len(disk) // SECTOR_BYTES)
        if disk[number * SECTOR_BYTES :][:SECTOR_BYTES]
        != before[number * SECTOR_BYTES :][:SECTOR_BYTES]
    }


@asynccontextmanager
async def attacking(
    folder: Path,
    device: Device,
    attack: str,
    *,
    cpus: int = 1,
    storm: str = "",
    exit_share: float = 0.2,
) -> AsyncIterator[avmm.MicroVM]:
    """A machine with the device and a guest that attacks it; the disk is folder/"attacked"."""
    devices: dict[str, Any] = {}
    line = command_line(
        attack,
        **{"kind": device.kind, "transport": device.transport, "ring": device.ring},
        **{"queue": device.queue, "write": device.write, "cpus": cpus, "storm": storm},
    )
    async with AsyncExitStack() as stack:
        if device.kind == "blk":
            path = folder / "attacked"
            path.write_bytes(image())
            devices["disks"] = [avmm.Disk(str(path), engine=device.engine)]  # type: ignore[arg-type]
        elif device.kind == "net":
            nic = avmm.Nic()
            devices["nets"] = [nic]
            await stack.enter_async_context(_running(_echo(nic)))
        else:
            devices["vsock"] = True
        config = avmm.Config(
            kernel=str(PROGRAM),
            memory=MEMORY_BYTES,
            cmdline=line,
            cpus=cpus,
            transport=device.transport,  # type: ignore[arg-type]
            io_threads=device.io_threads,
            exit_share=exit_share,
            **devices,
        )
        yield await stack.enter_async_context(avmm.MicroVM(config))


async def attack(folder: Path, device: Device, name: str, *, cpus: int = 1) -> Outcome:
    """All of one group of attacks, which end by themselves."""
    async with attacking(folder, device, name, cpus=cpus) as vm:
        events = vm.events()
        async with asyncio.timeout(HANG_S):
            reason = await vm.wait()
        faults = [event.kind async for event in events if isinstance(event, avmm.DeviceFault)]
        lines = vm.console.scrollback.decode().splitlines()
        assert lines[-1:] == ["end"] or reason.kind is not avmm.ExitKind.POWEROFF, lines
        said = dict(line.split(": ", 1) for line in lines if ": " in line)
        statistics = vm.statistics()
    disk = (folder / "attacked").read_bytes() if device.kind == "blk" else b""
    return Outcome(reason, said, faults, disk, statistics)


async def all_at_once(
    folder: Path, devices: Iterable[Device], name: str, *, cpus: int = 1
) -> dict[Device, Outcome]:
    """The same by as many guests as there are devices."""
    attacks: dict[Device, asyncio.Task[Outcome]] = {}
    async with asyncio.TaskGroup() as group:
        for device in devices:
            own = folder / str(device)
            own.mkdir()
            attacks[device] = group.create_task(attack(own, device, name, cpus=cpus))
    return {device: task.result() for device, task in attacks.items()}


class Neighbour:
    """A guest that reads and writes its disk, and checks what it reads."""

    def __init__(self, vm: avmm.MicroVM) -> None:
        self._vm = vm

    async def works(self) -> None:
        """Returns when it has done some more requests, all of them right."""
        reader, _ = self._vm.console.open(scrollback=False)
        async with asyncio.timeout(HANG_S):
            assert await reader.readexactly(2) == b".."
        assert set(self._vm.console.scrollback) == set(b".")


@asynccontextmanager
async def neighbour(folder: Path) -> AsyncIterator[Neighbour]:
    """In the same process and on the same loop as those beside it, and sound to the end."""
    path = folder / "neighbour"
    path.write_bytes(image())
    config = avmm.Config(
        kernel=str(PROGRAM),
        memory=MEMORY_BYTES,
        cmdline=command_line("behave", kind="blk", transport="pci"),
        disks=[avmm.Disk(str(path))],
    )
    async with avmm.MicroVM(config) as vm:
        beside = Neighbour(vm)
        await beside.works()
        yield beside
        await beside.works()
        statistics = vm.statistics().devices["blk0"]
        assert (statistics.faults, statistics.counters["errors"]) == (0, 0)
    assert sectors_changed(path.read_bytes()) <= {WORKED_ON}


@contextmanager
def nothing_left() -> Iterator[None]:
    """Descriptors and threads are the same afterwards."""
    before = held()
    yield
    assert held() == before


async def _echo(nic: avmm.Nic) -> None:
    """The network: what is sent comes back."""
    async for frame in nic:
        await nic.send(frame)


@asynccontextmanager
async def _running(work: Any) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
