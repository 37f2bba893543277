"""The avmm command: parsing and dispatch, thin over the library."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import avmm
from avmm.errors import AvmmError, ConfigError

EXIT_ERROR = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code. Errors of ours become one line on stderr."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return int(options.command(options))
    except AvmmError as e:
        if getattr(options, "verbose", 0) > 1:
            raise
        print(f"avmm: {e}", file=sys.stderr)
        return EXIT_BAD_INPUT if isinstance(e, ConfigError) else EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="avmm", description="An asyncio microVM monitor on Linux KVM."
    )
    parser.add_argument("--version", action="version", version=f"avmm {avmm.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="start a microVM and attach its serial console",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _LazyOptions(run, "avmm.cli.run")
    attach = commands.add_parser(
        "attach",
        help="be on the console of a running microVM that has a name",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _LazyOptions(attach, "avmm.cli.attach")
    listing = commands.add_parser("list", help="the running microVMs that have a name")
    _LazyOptions(listing, "avmm.cli.list")
    raw = argparse.RawDescriptionHelpFormatter
    exec_ = commands.add_parser(
        "exec", help="run a command in the guest of a named microVM", formatter_class=raw
    )
    _LazyOptions(exec_, "avmm.cli.exec")
    cp = commands.add_parser(
        "cp", help="copy a file into such a guest or out of it", formatter_class=raw
    )
    _LazyOptions(cp, "avmm.cli.cp")
    vhost_user = commands.add_parser(
        "vhost-user", help="serve a disk or a NIC to another VMM's guest"
    )
    _LazyOptions(vhost_user, "avmm.cli.vhost_user")
    doctor = commands.add_parser(
        "doctor", help="say what this host can do, and what to do about it"
    )
    _LazyOptions(doctor, "avmm.cli.doctor")
    bench = commands.add_parser("bench", help="measure avmm beside its peers")
    _LazyOptions(bench, "avmm.cli.bench")
    return parser


class _LazyOptions:
    """Fills a subcommand's parser from its module when that subcommand is used: the schema and
    everything below it is not needed to print `avmm --help`."""

    def __init__(self, parser: argparse.ArgumentParser, module: str) -> None:
        self._parse_known_args = parser.parse_known_args
        self._parser = parser
        self._module = module
        parser.parse_known_args = self.parse_known_args  # type: ignore[method-assign,assignment]

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        import importlib

        importlib.import_module(self._module).add_options(self._parser)
        return self._parse_known_args(args, namespace)
