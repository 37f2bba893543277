"""avmm bench: measure, show, plot and compare."""

from __future__ import annotations

import argparse
import sys

from avmm.bench import compare, plot, record, report, suite
from avmm.cli.doctor import hardware_virtualization
from avmm.cli.main import EXIT_ERROR
from avmm.errors import ConfigError

_EPILOG = """\
Contenders of a row take turns in one run; the table shows medians, half the range of the runs as
a part of the median, and our ratio to each peer and to the limit, which is what the host itself
does with the same work. Suites that boot a stock kernel need hardware KVM: scripts/bench runs
them in the testbed elsewhere.

Exit status: 0 measured (whatever the aims), 1 nothing could be measured, 2 bad input.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `avmm bench`: one word for each group of suites, and what to do with files."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    words = parser.add_subparsers(required=True, metavar="WHAT", dest="what")
    for group in (*suite.GROUPS, "all"):
        names = [s.name for s in suite.SUITES if s.group in _groups(group)]
        _add_measuring(words.add_parser(group, help=f"measure {', '.join(names)}"))
    shown = words.add_parser("show", help="the table of result files, several as one")
    shown.add_argument("files", nargs="+", metavar="FILE")
    shown.add_argument("--markdown", action="store_true", help="as for docs/performance.md")
    _add_outputs(shown)
    shown.set_defaults(command=_show)
    compared = words.add_parser("compare", help="what changed between two result files")
    compared.add_argument("first", metavar="A")
    compared.add_argument("second", metavar="B")
    compared.set_defaults(command=_compare)


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vs", metavar="PEER,...", help=f"peers to run beside us, of {', '.join(suite.PEERS)}"
    )
    parser.add_argument("--runs", type=int, default=3, help="of each contender, default 3")
    parser.add_argument("--seconds", type=float, default=1.0, help="of one measurement, default 1")
    parser.add_argument(
        "--ground",
        choices=("native", "guest"),
        help="only suites without a VM, or only those that boot a stock kernel",
    )
    _add_outputs(parser)
    parser.set_defaults(command=_measure)


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the results to a file")
    parser.add_argument("--plot", metavar="DIR", help="write a picture of each suite")
    parser.add_argument("--plot-format", choices=("png", "svg"), default="png")


def _measure(options: argparse.Namespace) -> int:
    if options.runs < 1 or options.seconds <= 0:
        raise ConfigError("value", "--runs and --seconds: more than 0 is needed")
    result = suite.run(
        _groups(options.what),
        _grounds(options.ground),
        suite.Options(
            peers=_peers(options.vs),
            runs=options.runs,
            seconds=options.seconds,
            say=_say,
            leave_out=lambda text: _say(f"left out: {text}"),
        ),
        keep=lambda so_far: record.write(options.json, so_far) if options.json else None,
    )
    _put_out(result, options)
    return 0 if result.cases else EXIT_ERROR


def _groups(what: str) -> tuple[str, ...]:
    return suite.ALL if what == "all" else (what,)


def _grounds(asked: str | None) -> tuple[str, ...]:
    if asked is not None:
        return (asked,)
    with open("/proc/cpuinfo") as file:
        if hardware_virtualization(file.read()):
            return ("native", "guest")
    _say("no hardware KVM, so no suites with guests: scripts/bench runs them in the testbed")
    return ("native",)


def _peers(text: str | None) -> tuple[str, ...]:
    if text is None:
        return suite.PEERS
    peers = tuple(text.split(","))
    for peer in peers:
        if peer not in suite.PEERS:
            raise ConfigError(
                "peer", f"--vs {peer}: no such peer; known are {', '.join(suite.PEERS)}"
            )
    return peers


def _say(text: str) -> None:
    print(f"avmm bench: {text}", file=sys.stderr, flush=True)


def _show(options: argparse.Namespace) -> int:
    _put_out(record.merge(record.read(path) for path in options.files), options)
    return 0


def _put_out(result: record.Record, options: argparse.Namespace) -> None:
    # The file first: what was measured is not to be lost to a plot that fails.
    if options.json:
        record.write(options.json, result)
    found = report.tables(result.cases)
    if getattr(options, "markdown", False):
        print(*(report.markdown(table) for table in found), report.summary(result), sep="\n\n")
    else:
        report.show(found, report.summary(result))
    if options.plot:
        for path in plot.plot(result, options.plot, options.plot_format):
            _say(f"wrote {path}")


def _compare(options: argparse.Namespace) -> int:
    changes, missing = compare.compare(record.read(options.first), record.read(options.second))
    report.show([compare.table(changes)], "\n".join(missing))
    return 0
