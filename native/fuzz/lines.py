"""The smallest inputs that reach all lines of avmm which any of them reaches; call it by
`scripts/fuzz --merge`. usage: lines.py NAME FILE...     The files to keep, one a line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Step = tuple[str, int, int]


def steps_of(target: Callable[[bytes], None], data: bytes) -> set[Step]:
    """From which line to which it went, in which file."""
    seen: set[Step] = set()
    before = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal before
        if "/avmm/" not in frame.f_code.co_filename:
            return None
        seen.add((frame.f_code.co_filename, before, frame.f_lineno))
        before = frame.f_lineno
        return trace

    sys.settrace(trace)
    try:
        target(data)
    finally:
        sys.settrace(None)
    return seen


def main() -> None:
    """The command."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]
    target = importlib.import_module("fakes.parser_targets").TARGETS[sys.argv[1]]
    known: set[Step] = set()
    for path in sorted(map(Path, sys.argv[2:]), key=lambda path: (path.stat().st_size, path.name)):
        steps = steps_of(target, path.read_bytes())
        if not steps <= known:
            known |= steps
            print(path)


if __name__ == "__main__":
    main()
