"""A record as tables: for the terminal by rich where it is installed, as plain text, as Markdown.

All three show the same cells.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from avmm.bench.record import OWN, Case, Costs, Record

MET, MISSED, UNTRIED = "met", "MISSED", "not measured"

_SCALE = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "u"), (1e-9, "n"))


@dataclass(frozen=True, slots=True)
class Table:
    """One suite's rows, or its costs."""

    title: str
    head: list[str]
    rows: list[list[str]]


def number(value: float) -> str:
    """Three digits and a letter: 333333 is "333k"."""
    for scale, letter in _SCALE:
        if abs(value) >= scale:
            scaled = value / scale
            digits = 0 if abs(scaled) >= 100 else 1 if abs(scaled) >= 10 else 2
            return f"{scaled:.{digits}f}{letter}"
    return "0"


def tables(cases: Iterable[Case]) -> list[Table]:
    """For each suite its results, then its costs, if any were measured."""
    suites: dict[str, list[Case]] = {}
    for case in cases:
        suites.setdefault(case.suite, []).append(case)
    found: list[Table] = []
    for suite, members in suites.items():
        found.append(_results(suite, members))
        costs = _costs(suite, members)
        if costs.rows:
            found.append(costs)
    return found


def _results(suite: str, cases: list[Case]) -> Table:
    names = dict.fromkeys(name for case in cases for name in case.series)
    order = sorted(names, key=lambda name: name != OWN)
    head = ["row", "unit", *order, "aims"]
    rows = [
        [case.name, case.unit, *(_cell(case, name) for name in order), _verdicts(case)]
        for case in cases
    ]
    return Table(suite, head, rows)


def _cell(case: Case, name: str) -> str:
    """Median, spread, and how we stand to it."""
    median = case.median(name)
    if median is None:
        return "-"
    text = f"{number(median)} ±{100 * case.spread(name):.0f}%"
    ratio = case.ratio(name)
    return text if name == OWN or ratio is None else f"{text} ({ratio:.2f}x)"


def _verdicts(case: Case) -> str:
    words = {True: MET, False: MISSED, None: UNTRIED}
    sign = ">=" if case.better == "higher" else "<="
    return ", ".join(
        f"{sign}{aim.ratio:g}x {aim.against}: {words[case.meets(aim)]}" for aim in case.aims
    )


_COSTS: tuple[tuple[str, Callable[[Costs], float | None], float, str], ...] = (
    ("CPU us/request", lambda costs: costs.cpu_s_per_request, 1e6, ".2f"),
    ("driver CPU us", lambda costs: costs.driver_cpu_s_per_request, 1e6, ".2f"),
    ("kicks/request", lambda costs: costs.kicks_per_request, 1, ".3f"),
    ("interrupts/request", lambda costs: costs.interrupts_per_request, 1, ".3f"),
    ("exits/request", lambda costs: costs.exits_per_request, 1, ".3f"),
    ("p50 us", lambda costs: costs.p50_s, 1e6, ".1f"),
    ("p99 us", lambda costs: costs.p99_s, 1e6, ".1f"),
)


def _costs(suite: str, cases: list[Case]) -> Table:
    rows: list[list[str]] = []
    for case in cases:
        for name, costs in case.costs.items():
            cells = ((get(costs), scale, form) for _, get, scale, form in _COSTS)
            texts = ["-" if v is None else format(v * scale, form) for v, scale, form in cells]
            rows.append([case.name, name, *texts])
    return Table(f"{suite}: costs", ["row", "of", *(name for name, *_ in _COSTS)], rows)


def summary(record: Record) -> str:
    """Where and when, how many aims were met, and what was left out."""
    verdicts = [case.meets(aim) for case in record.cases for aim in case.aims]
    host = record.host
    lines = [
        f"{host.system}, {host.processor}, {host.cpus} CPUs, avmm {host.avmm}, "
        f"{record.began}, {record.duration_s:.0f} s",
        f"aims: {verdicts.count(True)} met, {verdicts.count(False)} missed, "
        f"{verdicts.count(None)} not measured",
        *(f"left out: {note}" for note in record.notes),
    ]
    return "\n".join(lines)


def plain(table: Table) -> str:
    """Aligned columns."""
    lines = [table.head, *table.rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(table.head))]
    body = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
    return "\n".join([table.title, *body])


def markdown(table: Table) -> str:
    """A table for docs/performance.md."""
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    body = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([f"### {table.title}", "", *body])


def show(all_tables: Iterable[Table], foot: str = "") -> None:
    """On stdout: by rich when it is a terminal and rich is installed, else plain."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        _show_rich(all_tables, foot)
        return
    for table in all_tables:
        print(plain(table), end="\n\n")
    if foot:
        print(foot)


def _show_rich(all_tables: Iterable[Table], foot: str) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console()
    for table in all_tables:
        shown = RichTable(title=table.title, title_justify="left")
        for at, name in enumerate(table.head):
            shown.add_column(name, no_wrap=at == 0, justify="left")
        for row in table.rows:
            shown.add_row(*(Text(cell, style=_style(cell)) for cell in row))
        console.print(shown)
    if foot:
        console.print(Text(foot))


def _style(cell: str) -> str:
    if MISSED in cell:
        return "red"
    return "green" if MET in cell else ""
