"""What a benchmark leaves behind: one JSON file of cases, each with the runs of every contender.

Nothing derived is stored: medians, ratios and verdicts are computed from the runs.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec

import avmm
from avmm.errors import ConfigError

VERSION = 1
OWN = "avmm"
LIMIT = "limit"
"""What the host itself does with the same work, with no device in between."""
GOAL = "goal"
"""A number that the project has set itself."""
BEST = "best"
"""In an aim: the best of the peers that took part."""


class Aim(msgspec.Struct, frozen=True, omit_defaults=True):
    """Our median shall be `ratio` times that of `against` or better: at least where higher is
    better, at most where lower is. against: a series' name, LIMIT, GOAL or BEST."""

    against: str
    ratio: float


class Costs(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a request costs a contender, medians over its runs; None where it was not measured.

    driver_cpu_s_per_request: of the front-end that asks, not of the device that answers.
    """

    cpu_s_per_request: float | None = None
    driver_cpu_s_per_request: float | None = None
    kicks_per_request: float | None = None
    interrupts_per_request: float | None = None
    exits_per_request: float | None = None
    p50_s: float | None = None
    p99_s: float | None = None


class Case(msgspec.Struct, frozen=True, omit_defaults=True):
    """One row: the same work done by all contenders, taking turns.

    name: unique in its suite. series: contender to its runs' values, in `unit`; "avmm OPTION" is
    avmm in another configuration than its default. costs: by contender.
    """

    suite: str
    name: str
    unit: str
    better: Literal["higher", "lower"]
    series: dict[str, list[float]]
    aims: list[Aim] = []
    costs: dict[str, Costs] = {}

    @property
    def peers(self) -> list[str]:
        """The contenders: neither us, in whatever configuration, nor the limit or the goal."""
        return [name for name in self.series if name.split()[0] not in (OWN, LIMIT, GOAL)]

    def median(self, name: str) -> float | None:
        """Of a series, LIMIT or BEST; None when it did not take part."""
        if name == BEST:
            medians = [statistics.median(self.series[peer]) for peer in self.peers]
            if not medians:
                return None
            return max(medians) if self.better == "higher" else min(medians)
        runs = self.series.get(name)
        return statistics.median(runs) if runs else None

    def spread(self, name: str) -> float:
        """Half the way from the lowest run to the highest, as a part of the median."""
        runs = self.series[name]
        median = statistics.median(runs)
        return (max(runs) - min(runs)) / 2 / median if median else 0.0

    def ratio(self, against: str) -> float | None:
        """Our median by that of `against`; None when either did not take part."""
        own, other = self.median(OWN), self.median(against)
        return own / other if own is not None and other else None

    def meets(self, aim: Aim) -> bool | None:
        """Whether the aim is met; None when it was not put to the test."""
        ratio = self.ratio(aim.against)
        if ratio is None:
            return None
        return ratio >= aim.ratio if self.better == "higher" else ratio <= aim.ratio


class Host(msgspec.Struct, frozen=True):
    """Where it ran."""

    system: str
    processor: str
    cpus: int
    memory_bytes: int
    avmm: str
    python: str


class Record(msgspec.Struct, frozen=True):
    """The file. began: ISO 8601, UTC. notes: what was left out, and why."""

    host: Host
    began: str
    duration_s: float
    cases: list[Case]
    notes: list[str] = []
    version: Annotated[int, msgspec.Meta(description="of this format")] = VERSION


def this_host() -> Host:
    """The machine that runs this, as far as it tells."""
    with open("/proc/cpuinfo") as file:
        models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return Host(
        system=f"{platform.system()} {platform.release()}",
        processor=models[0] if models else platform.machine(),
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        avmm=avmm.__version__,
        python=platform.python_version(),
    )


def read(path: str) -> Record:
    """A record's file; ConfigError("bench-file") when it is none."""
    try:
        with open(path, "rb") as file:
            record = msgspec.json.decode(file.read(), type=Record)
    except OSError as e:
        raise ConfigError("bench-file", f"{path}: {os.strerror(e.errno or 0)}") from e
    except msgspec.DecodeError as e:
        raise ConfigError("bench-file", f"{path}: not a result of `avmm bench --json`: {e}") from e
    if record.version != VERSION:
        raise ConfigError(
            "bench-file",
            f"{path}: format {record.version}, but this avmm reads {VERSION}; measure again",
        )
    return record


def write(path: str, record: Record) -> None:
    """Put a record into a file; ConfigError("bench-file")."""
    text = msgspec.json.format(msgspec.json.encode(record), indent=1)
    try:
        with open(path, "wb") as file:
            file.write(text + b"\n")
    except OSError as e:
        raise ConfigError("bench-file", f"{path}: {os.strerror(e.errno or 0)}") from e


def merge(records: Iterable[Record]) -> Record:
    """One record of several, each case from the last that has it; the first's host and date."""
    records = list(records)
    cases = {(case.suite, case.name): case for record in records for case in record.cases}
    return Record(
        host=records[0].host,
        began=records[0].began,
        duration_s=sum(record.duration_s for record in records),
        cases=list(cases.values()),
        notes=list(dict.fromkeys(note for record in records for note in record.notes)),
    )
