"""avmm list: the named microVMs that run."""

from __future__ import annotations

import argparse

from avmm.cli import instance


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `avmm list`: none."""
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Print a line for each: name and process id."""
    for found, pid in instance.running():
        print(f"{found.name}\t{pid}")
    return 0
