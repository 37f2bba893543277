"""Guests without an operating system, for minutes: they attack their devices, reset and set them up
in every way, are paused, told to end, killed, and started anew, a few at a time; beside them one
guest does nothing but work. Any KVM will do.

After each interval all but that one are gone, and this process has to hold what it held before.

python -m avmm.bench.soak [--minutes M] [--interval SECONDS] [--guests N] [--seed N]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from avmm.bench.attacker import MEMORY_BYTES, PROGRAM, check_program, command_line
from avmm.bench.guest.soak import MEMORY_GROWTH_MAX_KIB, Held, held
from avmm.block.objects import RamDisk
from avmm.errors import AvmmError
from avmm.loop import run
from avmm.machine.config import Config
from avmm.machine.lifecycle import State
from avmm.machine.machine import MicroVM
from avmm.machine.reason import ExitKind
from avmm.units import KIB
from avmm.virtio.devices.blk import Disk
from avmm.virtio.devices.blk_source import AsyncDisk
from avmm.virtio.devices.nic import Nic

if TYPE_CHECKING:
    from sys import UnraisableHookArgs  # there for type checkers only

ATTACKS = ("rings", "requests", "setup", "races", "races", "triple-fault", "nowhere")
STORMS = (
    *("port", "unassigned", "mmio", "reset", "stray-kick", "kick", "fault", "bar", "mask"),
    *("serial", "requests"),
)
_HANG_S = 600.0
"""For one guest, however busy the host is."""
_SETTLE_S = 30.0
_STORM_S = 1.0
_REST_S = 0.3
_DISK_BYTES = 32 * KIB
_WARM_UP = 2
"""Intervals before what is held has to stay: every kind of guest has been there once."""
_MAY_END = (ExitKind.POWEROFF, ExitKind.KILLED, ExitKind.STOPPED, ExitKind.CRASH)
_MAY_FAIL = ("triple-fault", "nowhere")
"""What a KVM without hardware behind it cannot go on with."""

_BAD = ("BROKEN", "TAKEN", "WRITTEN AFTERWARDS", "SOMETHING", "UNKNOWN")


@dataclass(frozen=True, slots=True)
class Life:
    """One guest's: what it does to which device."""

    attack: str
    storm: str
    kind: str
    transport: str
    ring: str
    engine: str
    queue: int
    write: bool
    cpus: int
    io_threads: int

    @classmethod
    def chosen(cls, choice: random.Random) -> Life:
        """Any."""
        attack = choice.choice((*ATTACKS, "storm"))
        kind = choice.choice(("blk", "blk", "net", "vsock"))
        return cls(
            attack,
            choice.choice(STORMS) if attack == "storm" else "",
            kind,
            choice.choice(("pci", "mmio")),
            choice.choice(("packed", "split")),
            choice.choice(("io_uring", "threads", "object")),
            0 if kind == "blk" else choice.randrange(2),
            choice.random() < 0.5,
            choice.choice((2, 4)) if attack in ("races", "storm") else 1,
            choice.randrange(2),
        )

    @property
    def ends(self) -> bool:
        """By itself."""
        return self.attack != "storm"

    def config(self, folder: Path, nic: Nic) -> Config:
        """Of its machine."""
        devices: dict[str, Any] = {}
        if self.kind == "net":
            devices["nets"] = [nic]
        elif self.kind == "vsock":
            devices["vsock"] = True
        elif self.engine == "object":
            devices["disks"] = [AsyncDisk(RamDisk(_DISK_BYTES))]
        else:
            path = folder / "disk"
            path.write_bytes(bytes(_DISK_BYTES))
            devices["disks"] = [Disk(str(path), engine=cast("Any", self.engine))]
        words: dict[str, Any] = {name: getattr(self, name) for name in _WORDS}
        return Config(
            kernel=str(PROGRAM),
            memory=MEMORY_BYTES,
            cmdline=command_line(self.attack, **words),
            cpus=self.cpus,
            transport=cast("Literal['pci', 'mmio']", self.transport),
            io_threads=self.io_threads,
            **devices,
        )


_WORDS = ("kind", "transport", "ring", "queue", "cpus", "write", "storm")


@dataclass(slots=True)
class Soak:
    """What came of it. lives: by attack; ends: by kind; requests: of the guest that works.
    held: after each interval. problems: empty when all is well."""

    seconds: float = 0.0
    lives: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    pauses: int = 0
    requests: int = 0
    slowest_turn_s: float = 0.0
    held: list[Held] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


async def soak(
    folder: Path,
    *,
    seconds: float,
    interval_s: float,
    guests: int = 2,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Soak:
    """So long, with `guests` at a time."""
    check_program()
    result = Soak()
    choice = random.Random(seed)
    began = time.monotonic()
    async with _at_work(folder) as worker:
        turns = asyncio.create_task(_watch_turns(result))
        try:
            done = 0
            while time.monotonic() - began < seconds:
                until = time.monotonic() + interval_s
                async with asyncio.TaskGroup() as group:
                    for number in range(guests):
                        own = folder / str(number)
                        own.mkdir(exist_ok=True)
                        seeded = random.Random(choice.random())
                        group.create_task(_live_on(own, seeded, until, result))
                requests = _requests(worker)
                if worker.state is not State.RUNNING or requests == done:
                    result.problems.append(f"the guest that works stands still at {requests}")
                done = result.requests = requests
                result.held.append(await _held_at_rest(result.held))
                result.seconds = time.monotonic() - began
                say(
                    f"{result.seconds:.0f} s: {sum(result.lives.values())} lives, "
                    f"{requests} requests beside them; {result.held[-1]}"
                )
        finally:
            turns.cancel()
    _judge(result)
    return result


@asynccontextmanager
async def _at_work(folder: Path) -> AsyncIterator[MicroVM]:
    """The guest that harms nobody."""
    path = folder / "worker"
    path.write_bytes(bytes(_DISK_BYTES))
    line = command_line("behave", kind="blk", transport="pci")
    disks: list[Disk | AsyncDisk] = [Disk(str(path))]
    async with MicroVM(
        Config(kernel=str(PROGRAM), memory=MEMORY_BYTES, cmdline=line, disks=disks)
    ) as vm:
        yield vm


def _requests(vm: MicroVM) -> int:
    counters = vm.statistics().devices["blk0"].counters
    return counters["reads"] + counters["writes"]


async def _held_at_rest(before: Sequence[Held]) -> Held:
    """A thread that was joined is to be seen a while longer, on a busy host above all."""
    until = time.monotonic() + _SETTLE_S
    least = min((h.threads for h in before[_WARM_UP:]), default=None)
    now = held()
    while least is not None and now.threads > least and time.monotonic() < until:
        await asyncio.sleep(0.05)
        now = held()
    return now


async def _watch_turns(result: Soak) -> None:
    """How late the loop comes around at worst."""
    while True:
        due = time.monotonic() + 0.01
        await asyncio.sleep(0.01)
        result.slowest_turn_s = max(result.slowest_turn_s, time.monotonic() - due)


async def _live_on(folder: Path, choice: random.Random, until: float, result: Soak) -> None:
    """One guest after another."""
    while time.monotonic() < until:
        life = Life.chosen(choice)
        result.lives[life.attack] += 1
        try:
            async with asyncio.timeout(_HANG_S):
                await _live(life, folder, choice, result)
        except TimeoutError:
            result.problems.append(f"{life}: it hung")
        except AvmmError as e:
            result.problems.append(f"{life}: {e}")


async def _live(life: Life, folder: Path, choice: random.Random, result: Soak) -> None:
    async with AsyncExitStack() as stack:
        nic = Nic()
        if life.kind == "net":
            await stack.enter_async_context(_echoing(nic))
        vm = await stack.enter_async_context(MicroVM(life.config(folder, nic)))
        ending = asyncio.create_task(vm.wait())
        kill_at = time.monotonic() + _STORM_S if not life.ends else None
        while not ending.done():
            await asyncio.wait([ending], timeout=choice.uniform(0, _REST_S))
            if kill_at is not None and time.monotonic() > kill_at:
                await vm.kill()
            elif not ending.done():
                await _disturb(vm, choice, result)
        reason = ending.result()
        result.ends[reason.kind.value] += 1
        said = vm.console.scrollback.decode(errors="replace")
        failed = reason.kind is ExitKind.ERROR and life.attack in _MAY_FAIL
        if reason.kind not in _MAY_END and not failed:
            result.problems.append(f"{life}: {reason}")
        if any(word in said for word in _BAD):
            result.problems.append(f"{life}: {said}")


async def _disturb(vm: MicroVM, choice: random.Random, result: Soak) -> None:
    """Now and then it is paused, and at times it has to end."""
    with contextlib.suppress(AvmmError):  # it has ended meanwhile
        match choice.randrange(80):
            case 0:
                await vm.kill()
            case 1:
                await vm.stop(grace_s=0.05)
            case number if number < 24:
                await vm.pause()
                result.pauses += 1
                await asyncio.sleep(choice.uniform(0, 0.02))
                await vm.resume()
            case _:
                vm.statistics()


@asynccontextmanager
async def _echoing(nic: Nic) -> AsyncIterator[None]:
    """The network: what is sent comes back."""

    async def echo() -> None:
        async for frame in nic:
            await nic.send(frame)

    task = asyncio.create_task(echo())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _judge(result: Soak) -> None:
    """What is held has to stay, as soon as every kind of guest has been there."""
    later = result.held[_WARM_UP:]
    if not later:
        return
    first = later[0]
    worst = max(h.anonymous_kib for h in later)
    if worst - first.anonymous_kib > MEMORY_GROWTH_MAX_KIB:
        result.problems.append(f"memory grew from {first.anonymous_kib} to {worst} KiB")
    for name in ("descriptors", "threads"):
        counts = [getattr(h, name) for h in later]
        # A thread that has ended may still be counted once, so fewer than before is no problem.
        if any(count > min(counts[:i]) for i, count in enumerate(counts) if i):
            result.problems.append(f"{name} grew: {counts}")


class _Complaints(logging.Handler):
    """What a process that is well never says: errors, warnings of the interpreter's."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR or record.name == "py.warnings":  # not guests' faults
            self._take(self.format(record))

    def unraisable(self, event: UnraisableHookArgs) -> None:
        """An exception that nothing could be told of, as from a callback out of C."""
        where = event.err_msg or "Exception ignored in"
        self._take(f"{where} {event.object!r}: {event.exc_value!r}")

    def _take(self, text: str) -> None:
        self.texts.append(text)
        print(f"soak: {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Say what happens on stderr; 0 when all is well."""
    parser = argparse.ArgumentParser(prog="scripts/soak --ground kvm")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--interval", type=float, default=30.0, metavar="SECONDS")
    parser.add_argument("--guests", type=int, default=2, help="at a time")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()

    def say(text: str) -> None:
        print(f"soak: {text}", file=sys.stderr, flush=True)

    complaints = _Complaints()
    logging.getLogger().addHandler(complaints)
    logging.captureWarnings(True)
    sys.unraisablehook = complaints.unraisable
    warnings.simplefilter("always", ResourceWarning)
    try:
        with tempfile.TemporaryDirectory(prefix="avmm-soak.") as folder:
            result = run(
                soak(
                    Path(folder),
                    seconds=asked.minutes * 60,
                    interval_s=asked.interval,
                    guests=asked.guests,
                    seed=asked.seed,
                    say=say,
                )
            )
    except AvmmError as e:
        say(f"failed: {e}")
        return 1
    say(
        f"{result.seconds:.0f} s; lives {dict(result.lives)}, ends {dict(result.ends)}, "
        f"{result.pauses} pauses; {result.requests} requests beside them; "
        f"the loop was {result.slowest_turn_s * 1000:.0f} ms late at worst"
    )
    problems = [*result.problems, *complaints.texts]
    for problem in problems:
        say(f"PROBLEM: {problem}")
    say("all is well" if not problems else f"{len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
