"""Contenders take turns: one boot each per run, all rows in one boot, and what came of them."""

from __future__ import annotations

import contextlib
import statistics
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from avmm.bench.guest import ground, parse
from avmm.bench.guest.contenders import Contender, Disk, Machine
from avmm.bench.guest.kit import Kit
from avmm.bench.guest.parse import Reading
from avmm.bench.guest.rows import Row, cmdline
from avmm.bench.guest.session import Boot, Boundary, boot
from avmm.bench.record import Aim, Case, Costs
from avmm.bench.suite import Options
from avmm.errors import HostError

T = TypeVar("T")

CPUS, MEMORY_MIB = 1, 512
TAP = "avmmbench0"
_TRIES = 2
"""A guest that hangs is tried once more: where the CPU is emulated, that happens by itself."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One row of one boot."""

    reading: Reading
    costs: Costs


@dataclass(slots=True)
class Results:
    """By contender and row, the runs."""

    runs: dict[tuple[str, str], list[Measured]] = field(default_factory=dict)

    def add(self, contender: str, row: str, measured: Measured) -> None:
        self.runs.setdefault((contender, row), []).append(measured)

    def case(self, suite: str, row: Row, series: dict[str, str], aims: list[Aim]) -> Case | None:
        """The row as a case; series: name in the case to the contender. None when nobody ran."""
        found = {
            name: runs
            for name, contender in series.items()
            if (runs := self.runs.get((contender, row.key)))
        }
        if not found:
            return None
        return Case(
            suite,
            row.title,
            row.unit,
            row.better,
            {name: [run.reading.value for run in runs] for name, runs in found.items()},
            aims,
            {name: _median_costs(runs) for name, runs in found.items()},
        )


def taking_part(contenders: Sequence[Contender], options: Options) -> list[Contender]:
    """Those who are asked for and can; who cannot is left out by name."""
    found = []
    for contender in contenders:
        if contender.peer is not None and not options.wants(contender.peer):
            continue
        why = contender.missing()
        if why is None:
            found.append(contender)
        else:
            options.leave_out(f"{contender.name}: {why}")
    return found


def take_turns(
    plan: Mapping[Contender, Sequence[Row]], options: Options, seconds: float
) -> Results:
    """Boot each contender once per run, in turns, for its rows. HostError when the host cannot."""
    kit = Kit.find()
    results = Results()
    kinds = {row.device for rows in plan.values() for row in rows}
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(ground.null_disk())
        report = stack.enter_context(ground.results_disk())
        stack.enter_context(ground.exit_counts())
        taps = (stack.enter_context(ground.tap(TAP)),) if "net" in kinds else ()
        vsock = stack.enter_context(ground.vsock_path()) if "vsock" in kinds else None
        contenders = taking_part(list(plan), options)
        for run in range(options.runs):
            for contender in contenders:
                options.say(f"run {run + 1} of {options.runs}: {contender.name}")
                rows = plan[contender]
                machine = Machine(
                    kit.kernel,
                    kit.bench_initrd,
                    cmdline(rows, seconds),
                    CPUS,
                    MEMORY_MIB,
                    (Disk(disk, direct=True), Disk(report)),
                    taps,
                    vsock if any(row.device == "vsock" for row in rows) else None,
                )
                _one(kit, contender, machine, rows, results, options)
    return results


def _one(
    kit: Kit,
    contender: Contender,
    machine: Machine,
    rows: Sequence[Row],
    results: Results,
    options: Options,
) -> None:
    report = machine.disks[-1].path

    def attempt() -> tuple[Boot, dict[str, str]]:
        ground.clear(report)
        with ground.servers(kit, machine):
            seen = boot(contender, machine)
        return seen, read_report(report)

    done = again(attempt, options)
    if done is None:
        return
    seen, files = done
    before = seen.boundaries[0] if seen.boundaries else None
    for row, after in zip(rows, seen.boundaries[1:], strict=False):
        assert before is not None
        try:
            results.add(contender.name, row.key, _measure(row, files, before, after))
        except (ValueError, KeyError) as e:
            said = files.get(f"{row.key}.err", "").strip()
            options.leave_out(f"{contender.name}: {row.title}: {e} {said}".rstrip())
        before = after


def again(attempt: Callable[[], T], options: Options) -> T | None:
    """What an attempt returns; after a failure one more, then None, and both are told."""
    for _ in range(_TRIES):
        try:
            return attempt()
        except HostError as e:
            options.leave_out(str(e))
    return None


def read_report(path: Path) -> dict[str, str]:
    """What the guest wrote over its results disk. HostError("bench-guest") when it did not."""
    try:
        with tarfile.open(path, "r:") as archive:
            files = dict(_texts(archive))
    except tarfile.TarError as e:
        raise HostError("bench-guest", op=f"The guest's report is broken ({e})") from e
    if not files:
        raise HostError("bench-guest", op="The guest left no report")
    return files


def _texts(archive: tarfile.TarFile) -> Iterator[tuple[str, str]]:
    for member in archive:
        file = archive.extractfile(member)
        if file is not None:
            yield member.name.removeprefix("./"), file.read().decode(errors="replace")


def _measure(row: Row, files: dict[str, str], before: Boundary, after: Boundary) -> Measured:
    if after.row != row.key or after.status:
        raise ValueError(f"status {after.status}")
    reading = row.read(files[row.key])
    first, last = files[f"{row.key}.before"], files[f"{row.key}.after"]
    requests = parse.packets(last) - parse.packets(first) if row.packets else reading.requests
    exits = None
    if before.sample.exits is not None and after.sample.exits is not None:
        exits = after.sample.exits - before.sample.exits
    return Measured(
        reading,
        Costs(
            cpu_s_per_request=_per(after.sample.cpu_s - before.sample.cpu_s, requests),
            kicks_per_request=_per(_kicks(row.device, before.own, after.own), requests),
            interrupts_per_request=_per(parse.interrupts(last) - parse.interrupts(first), requests),
            exits_per_request=_per(exits, requests),
            p50_s=reading.p50_s,
            p99_s=reading.p99_s,
        ),
    )


def _per(amount: float | None, requests: int) -> float | None:
    return amount / requests if amount is not None and requests else None


def _kicks(device: str, before: dict[str, Any] | None, after: dict[str, Any] | None) -> int | None:
    """From avmm's own statistics: the kicks its queues of that kind took."""
    if before is None or after is None:
        return None

    def total(statistics: dict[str, Any]) -> int:
        devices = statistics["devices"].values()
        return sum(q["kicks"] for d in devices if d["type"] == device for q in d["queues"])

    return total(after) - total(before)


def _median_costs(runs: Sequence[Measured]) -> Costs:
    medians: dict[str, float | None] = {}
    for name in Costs.__struct_fields__:
        values = [v for run in runs if (v := getattr(run.costs, name)) is not None]
        medians[name] = statistics.median(values) if values else None
    return Costs(**medians)
