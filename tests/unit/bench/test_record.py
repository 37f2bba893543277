"""Records: statistics, verdicts, files, comparison, tables, plots."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from avmm.bench import compare, plot, record, report, suite
from avmm.bench.record import BEST, LIMIT, OWN, Aim, Case, Costs, Host, Record
from avmm.cli.main import main
from avmm.errors import ConfigError, HostError

HOST = Host("Linux 6", "a processor", 2, 1 << 30, "0.1.0", "3.11")


def case(name: str = "row", better: str = "higher", **series: list[float]) -> Case:
    return Case("s", name, "IOPS", better, series)  # type: ignore[arg-type]


def record_of(*cases: Case, notes: tuple[str, ...] = ()) -> Record:
    return Record(HOST, "2026-01-01T00:00:00+00:00", 1.5, list(cases), list(notes))


def test_the_median_is_that_of_the_runs_and_the_spread_half_their_range() -> None:
    row = case(avmm=[90.0, 110.0, 100.0])
    assert row.median(OWN) == 100
    assert row.spread(OWN) == pytest.approx(0.1)
    assert row.median("nobody") is None


def test_ratios_are_ours_by_theirs_whichever_way_is_better() -> None:
    row = case(avmm=[150.0], qemu=[100.0], limit=[300.0])
    assert (row.ratio("qemu"), row.ratio(LIMIT), row.ratio("nobody")) == (1.5, 0.5, None)
    assert row.peers == ["qemu"]


@pytest.mark.parametrize(("better", "best"), [("higher", 120.0), ("lower", 80.0)])
def test_the_best_peer_is_neither_us_nor_the_limit(better: str, best: float) -> None:
    row = case(better=better, avmm=[1.0, 999.0], a=[80.0], b=[120.0], limit=[5.0])
    assert row.median(BEST) == best
    assert case(avmm=[1.0], limit=[2.0]).median(BEST) is None


@pytest.mark.parametrize(
    ("better", "own", "met"),
    [
        ("higher", 150.0, True),
        ("higher", 149.0, False),
        ("lower", 150.0, True),
        ("lower", 151.0, False),
    ],
)
def test_an_aim_is_a_floor_or_a_ceiling_by_what_is_better(
    better: str, own: float, met: bool
) -> None:
    row = case(better=better, avmm=[own], qemu=[100.0])
    assert row.meets(Aim("qemu", 1.5)) is met
    assert row.meets(Aim("nobody", 1.5)) is None


def test_a_record_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    written = record_of(
        Case("s", "r", "s", "lower", {OWN: [1.0]}, [Aim(BEST, 1.0)], {OWN: Costs(1e-6)}),
        notes=("kvmtool is missing",),
    )
    path = str(tmp_path / "r.json")
    record.write(path, written)
    assert record.read(path) == written


@pytest.mark.parametrize("text", [None, "{", '{"version": 1}', "[]"])
def test_a_file_that_is_no_record_is_a_configuration_error(
    tmp_path: Path, text: str | None
) -> None:
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=str(path)):
        record.read(str(path))


def test_a_record_of_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    record.write(str(path), record_of())
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(ConfigError, match="format 2"):
        record.read(str(path))


def test_merging_takes_each_row_from_the_last_record_that_has_it() -> None:
    one = record_of(case("a", avmm=[1.0]), case("b", avmm=[1.0]), notes=("n",))
    two = record_of(case("b", avmm=[2.0]), case("c", avmm=[2.0]), notes=("n", "m"))
    merged = record.merge([one, two])
    assert [(row.name, row.series[OWN]) for row in merged.cases] == [
        ("a", [1.0]),
        ("b", [2.0]),
        ("c", [2.0]),
    ]
    assert merged.notes == ["n", "m"]
    assert merged.duration_s == 3.0


def test_a_change_counts_only_where_the_runs_do_not_overlap() -> None:
    old = record_of(
        case("far", avmm=[100.0, 110.0]), case("near", avmm=[100.0, 110.0]), case("one", avmm=[1.0])
    )
    new = record_of(
        case("far", avmm=[80.0, 90.0]), case("near", avmm=[105.0, 120.0]), case("one", avmm=[2.0])
    )
    changes, missing = compare.compare(old, new)
    assert [(change.beyond, change.better) for change in changes] == [
        (True, False),
        (False, True),
        (None, True),
    ]
    assert changes[0].ratio == pytest.approx(85 / 105)
    assert missing == []
    assert [row[-1] for row in compare.table(changes).rows] == [
        "WORSE",
        "within the spread",
        "single runs",
    ]


def test_lower_may_be_better_and_lone_rows_are_named() -> None:
    old = record_of(case("t", "lower", avmm=[2.0, 2.1]), case("gone", avmm=[1.0]))
    new = record_of(case("t", "lower", avmm=[1.0, 1.1]), case("new", avmm=[1.0]))
    changes, missing = compare.compare(old, new)
    assert [change.better for change in changes] == [True]
    assert missing == ["only in the first: s: gone", "only in the second: s: new"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(333_333, "333k"), (1.5e6, "1.50M"), (55e-6, "55.0u"), (0.0, "0"), (-2000, "-2.00k")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert report.number(value) == text


def test_the_table_shows_ratios_verdicts_and_what_is_missing() -> None:
    row = Case(
        *("s", "r", "IOPS", "higher"),
        {"qemu": [100.0], OWN: [150.0, 150.0]},
        [Aim("qemu", 1.2), Aim("qemu", 2.0), Aim(LIMIT, 0.5)],
        {OWN: Costs(cpu_s_per_request=2e-6, kicks_per_request=0.25)},
    )
    results, costs = report.tables([row, Case("s", "q", "IOPS", "higher", {OWN: [1.0]})])
    assert results.head == ["row", "unit", OWN, "qemu", "aims"]
    assert results.rows[0][2:4] == ["150 ±0%", "100 ±0% (1.50x)"]
    verdicts = results.rows[0][4]
    assert verdicts == ">=1.2x qemu: met, >=2x qemu: MISSED, >=0.5x limit: not measured"
    assert results.rows[1][2:] == ["1.00 ±0%", "-", ""]
    assert costs.rows == [["r", OWN, "2.00", "-", "0.250", "-", "-", "-", "-"]]
    assert "| r | IOPS | 150 ±0% |" in report.markdown(results)
    assert report.plain(results).splitlines()[1].split() == results.head
    assert "1 met, 1 missed, 1 not measured" in report.summary(record_of(row))


@pytest.mark.slow
def test_a_plot_shows_every_suite(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    rows = [case("r", avmm=[1.0, 2.0], qemu=[1.0]), Case("t", "r", "s", "lower", {OWN: [1.0]})]
    made = plot.plot(record_of(*rows), str(tmp_path / "p"), "svg")
    assert [path.name for path in made] == ["s.svg", "t.svg"]
    assert all(path.read_text().startswith("<?xml") for path in made)


def test_a_plot_without_matplotlib_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HostError, match=r"pip install 'avmm\[bench\]'"):
        plot.plot(record_of(), str(tmp_path))


@pytest.fixture
def suites(monkeypatch: pytest.MonkeyPatch) -> None:
    """A suite that measures, and one that cannot."""

    def works(options: suite.Options) -> Iterator[Case]:
        yield case("r", avmm=[1.0] * options.runs, **{peer: [1.0] for peer in options.peers})

    def fails(options: suite.Options) -> Iterator[Case]:
        raise HostError("tool", op="fio", remedy="apt-get install fio")
        yield

    for name, cases in (("fake_works", works), ("fake_fails", fails)):
        module = types.ModuleType(name)
        module.cases = cases  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    fakes = (
        suite.Suite("fails", "blk", "native", "fake_fails"),
        suite.Suite("works", "blk", "native", "fake_works"),
        suite.Suite("guest", "blk", "guest", "not_imported"),
        suite.Suite("other", "net", "native", "not_imported"),
    )
    monkeypatch.setattr(suite, "SUITES", fakes)


@pytest.mark.usefixtures("suites")
def test_a_suite_that_cannot_run_is_left_out_with_its_reason() -> None:
    result = suite.run(("blk",), ("native",), suite.Options(peers=()))
    assert [row.name for row in result.cases] == ["r"]
    assert result.notes == ["fails: fio: apt-get install fio"]


@pytest.mark.usefixtures("suites")
def test_the_command_measures_shows_and_compares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "r.json")
    options = ["--vs", "qemu,vhost", "--runs", "2", "--ground", "native", "--json", path]
    assert main(["bench", "blk", *options]) == 0
    assert "1.00 ±0%" in capsys.readouterr().out
    assert record.read(path).cases[0].series == {OWN: [1.0, 1.0], "qemu": [1.0], "vhost": [1.0]}
    assert main(["bench", "show", path, path, "--markdown"]) == 0
    assert "| r | IOPS |" in capsys.readouterr().out
    assert main(["bench", "compare", path, path]) == 0
    assert "within the spread" in capsys.readouterr().out


@pytest.mark.usefixtures("suites")
@pytest.mark.parametrize(
    "arguments",
    [["blk", "--vs", "xen"], ["blk", "--runs", "0"], ["show", "/nonexistent/r.json"]],
)
def test_bad_input_to_bench_exits_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    assert arguments[-1] in capsys.readouterr().err or "--runs" in arguments
