"""Plots of a record by matplotlib: one picture a suite."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from avmm.bench.record import OWN, Case, Record
from avmm.bench.report import number
from avmm.errors import ConfigError, HostError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Format = Literal["png", "svg"]

_BAR_IN = 0.22
"""Height of a bar, in inches."""


def plot(record: Record, folder: str, form: Format = "png") -> list[Path]:
    """Write FOLDER/SUITE.png or .svg for every suite of the record; the files made.

    Rows of one unit share a panel. Each series' bar is its median, its whisker the runs' range.
    Raises HostError("plot") without matplotlib, ConfigError("plot") for a folder that cannot be
    written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise HostError("plot", op="import matplotlib", remedy="pip install 'avmm[bench]'")
    try:
        os.makedirs(folder, exist_ok=True)
        suites = dict.fromkeys(case.suite for case in record.cases)
        return [
            _plot_suite(
                suite,
                [case for case in record.cases if case.suite == suite],
                Path(folder) / f"{suite}.{form}",
            )
            for suite in suites
        ]
    except OSError as e:
        raise ConfigError("plot", f"--plot {folder}: {os.strerror(e.errno or 0)}") from e


def _plot_suite(suite: str, cases: list[Case], path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    units = list(dict.fromkeys(case.unit for case in cases))
    panels = [[case for case in cases if case.unit == unit] for unit in units]
    heights = [1.0 + _BAR_IN * sum(len(case.series) + 1 for case in panel) for panel in panels]
    figure = Figure(figsize=(9.0, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for panel, unit, at in zip(panels, units, axes[:, 0], strict=True):
        _draw(at, panel, unit)
    figure.suptitle(suite)
    figure.savefig(path)
    return path


def _draw(axes: Axes, cases: list[Case], unit: str) -> None:
    """Horizontal bars, the first case on top, grouped by case."""
    names = list(dict.fromkeys(name for case in cases for name in case.series))
    names.sort(key=lambda name: name != OWN)
    colours = {name: f"C{at}" for at, name in enumerate(names)}
    y = 0.0
    ticks: list[float] = []
    labelled: set[str] = set()
    for case in cases:
        first = y
        for name in names:
            median = case.median(name)
            if median is None:
                continue
            runs = case.series[name]
            axes.barh(
                y,
                median,
                0.9,
                color=colours[name],
                label=None if name in labelled else name,
                xerr=[[median - min(runs)], [max(runs) - median]],
            )
            axes.annotate(f" {number(median)}", (max(runs), y), va="center", fontsize=7)
            labelled.add(name)
            y += 1
        ticks.append((first + y - 1) / 2)
        y += 1
    axes.set_yticks(ticks, [case.name for case in cases], fontsize=8)
    axes.set_ylim(y - 0.5, -1.5)
    axes.set_xlabel(f"{unit} ({cases[0].better} is better)")
    axes.xaxis.set_major_formatter(lambda value, _: number(value))
    axes.margins(x=0.1)
    axes.legend(fontsize=7)
