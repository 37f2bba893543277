"""A target of tests/fakes/parser_targets.py as a libFuzzer program, by atheris: libFuzzer is guided
by the lines and comparisons of Python. usage: python.py NAME LIBFUZZER-ARGUMENTS..."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Does not return."""
    sys.path.insert(0, str(ROOT / "tests"))
    with atheris.instrument_imports(include=["avmm", "fakes"]):
        module = importlib.import_module("fakes.parser_targets")
    name = sys.argv.pop(1)
    atheris.Setup(sys.argv, module.TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
