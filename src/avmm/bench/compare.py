"""Two records side by side: what changed, and whether more than the runs scatter anyway."""

from __future__ import annotations

from dataclasses import dataclass

from avmm.bench.record import OWN, Case, Record
from avmm.bench.report import Table, number


@dataclass(frozen=True, slots=True)
class Change:
    """One row's series in both records. ratio: new median by old.

    beyond: the runs of one do not reach into the other's; None when a single run cannot tell.
    better: in the direction the row counts.
    """

    suite: str
    name: str
    series: str
    unit: str
    old: float
    new: float
    ratio: float
    beyond: bool | None
    better: bool


def compare(old: Record, new: Record) -> tuple[list[Change], list[str]]:
    """The changes of rows and series that both have, and a note for each that only one has."""
    before = {(case.suite, case.name): case for case in old.cases}
    after = {(case.suite, case.name): case for case in new.cases}
    changes = [
        change
        for key, case in after.items()
        if key in before
        for change in _changes(before[key], case)
    ]
    missing = [
        f"only in the first: {suite}: {name}"
        for suite, name in before
        if (suite, name) not in after
    ]
    missing += [
        f"only in the second: {suite}: {name}"
        for suite, name in after
        if (suite, name) not in before
    ]
    return changes, missing


def _changes(old: Case, new: Case) -> list[Change]:
    changes: list[Change] = []
    for name in sorted(new.series, key=lambda series: series != OWN):
        before, after = old.median(name), new.median(name)
        if not before or after is None:
            continue
        ratio = after / before
        changes.append(
            Change(
                suite=new.suite,
                name=new.name,
                series=name,
                unit=new.unit,
                old=before,
                new=after,
                ratio=ratio,
                beyond=_beyond(old.series[name], new.series[name]),
                better=ratio > 1 if new.better == "higher" else ratio < 1,
            )
        )
    return changes


def _beyond(old: list[float], new: list[float]) -> bool | None:
    if len(old) < 2 or len(new) < 2:
        return None
    return min(new) > max(old) or max(new) < min(old)


def table(changes: list[Change]) -> Table:
    """For the report: the rows beyond the spread are marked."""
    rows = [
        [
            f"{change.suite}: {change.name}",
            change.series,
            change.unit,
            number(change.old),
            number(change.new),
            f"{change.ratio:.2f}x",
            _mark(change),
        ]
        for change in changes
    ]
    return Table(
        "second by first", ["row", "of", "unit", "first", "second", "ratio", "change"], rows
    )


def _mark(change: Change) -> str:
    if change.beyond is None:
        return "single runs"
    if not change.beyond:
        return "within the spread"
    return "BETTER" if change.better else "WORSE"
