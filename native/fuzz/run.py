"""Runs fuzz targets under libFuzzer and says what they reached; call it by `scripts/fuzz`.

Those in C are built here. Those of what Python parses (tests/fakes/parser_targets.py) are run by
atheris, which is libFuzzer too."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from build import (
    CORPORA,
    NATIVE,
    SANITIZERS,
    THREAD_SANITIZER,
    Target,
    build,
    fuzzing,
    python_targets,
    targets,
)

WORK = NATIVE.parent / "build/fuzz"
FOUND = WORK / "found"
GROWN = WORK / "corpora"

INPUT_BYTES_MAX = 4096
COMMITTED_BYTES_MAX = 512
COMMITTED_PYTHON_BYTES_MAX = 2048  # a kernel has its headers before anything else
TIMEOUT_S = 5
RSS_LIMIT_MIB = 1024

LIMITS = (f"-timeout={TIMEOUT_S}", f"-rss_limit_mb={RSS_LIMIT_MIB}")
# After a fault the input is what matters, and it is kept.
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=1",
    # What allocates memory in a signal's handler is libFuzzer, for its limit of time. A failing
    # target is let go with the report, for libFuzzer to keep the input.
    "TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0",
}


@dataclass(frozen=True)
class Outcome:
    """edges: covered, of those in what the target links. kept: the input that failed."""

    executions: int
    executions_per_s: int
    edges: int
    edges_there: int
    kept: Path | None
    status: int
    output: str


def last(pattern: str, text: str) -> int:
    """The last number that a pattern finds; 0 without one."""
    found = re.findall(pattern, text)
    return int(found[-1]) if found else 0


@dataclass(frozen=True)
class Way:
    """How a target is run: `note` tells it from the same target under the other sanitizers."""

    target: Target
    program: tuple[str, ...]
    note: str = ""

    @property
    def name(self) -> str:
        return self.target.name + self.note


def ways(chosen: list[Target]) -> list[Way]:
    """Build all in C; those with threads twice. Raises subprocess.CalledProcessError."""
    native = [target for target in chosen if not target.is_python]
    programs = build(native, fuzzing(SANITIZERS), WORK / "programs")
    threaded = [target for target in native if target.threads]
    watched = build(threaded, fuzzing(THREAD_SANITIZER), WORK / "programs-thread")
    found = [Way(target, (str(programs[target.name]),)) for target in native]
    found += [Way(target, (str(watched[target.name]),), " (threads)") for target in threaded]
    by_atheris = (sys.executable, str(NATIVE / "fuzz/python.py"))
    return found + [Way(t, (*by_atheris, t.name)) for t in chosen if t.is_python]


def run(target: Target, program: tuple[str, ...], seconds: int) -> Outcome:
    """Fuzz one target, from its committed corpus and what earlier runs have added to that."""
    grown = GROWN / target.name
    for folder in (grown, FOUND, target.corpus):
        folder.mkdir(parents=True, exist_ok=True)
    before = set(FOUND.iterdir())
    command = [*program, f"-max_total_time={seconds}", f"-max_len={INPUT_BYTES_MAX}", *LIMITS]
    command += ["-print_final_stats=1", f"-artifact_prefix={FOUND}/{target.name}-"]
    # Threads take long to start, so each input is to be worth it.
    command += ["-len_control=0"] if target.threads else []
    ended = subprocess.run(
        [*command, str(grown), str(target.corpus)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | ENVIRONMENT,
        text=True,
        errors="replace",
    )
    output = ended.stderr
    executions = last(r"number_of_executed_units: (\d+)", output)
    return Outcome(
        executions=executions,
        executions_per_s=last(r"average_exec_per_sec: +(\d+)", output),
        edges=last(r"cov: (\d+)", output),
        edges_there=last(r"\((\d+) inline 8-bit counters\)", output),
        kept=next(iter(set(FOUND.iterdir()) - before), None),
        status=ended.returncode,
        output=output,
    )


def merge_lines(target: Target, new: Path) -> None:
    """The same where atheris, which cannot merge, has found the inputs."""
    files = [*target.corpus.iterdir(), *(GROWN / target.name).iterdir()]
    short = [str(path) for path in files if path.stat().st_size <= COMMITTED_PYTHON_BYTES_MAX]
    command = [sys.executable, str(NATIVE / "fuzz/lines.py"), target.name, *short]
    kept = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    for path in map(Path, kept.splitlines()):
        shutil.copy(path, new / hashlib.sha1(path.read_bytes()).hexdigest())


def merge(target: Target, program: tuple[str, ...]) -> None:
    """Make the committed corpus anew: the smallest files that reach what all known ones reach."""
    new = WORK / f"merged-{target.name}"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    GROWN.joinpath(target.name).mkdir(parents=True, exist_ok=True)
    if target.is_python:
        merge_lines(target, new)
    else:
        command = [*program, "-set_cover_merge=1", "-use_counters=0", *LIMITS]
        command += [f"-max_len={COMMITTED_BYTES_MAX}", str(new)]
        command += [str(target.corpus), str(GROWN / target.name)]
        subprocess.run(command, check=True, capture_output=True)
    # What once failed is kept by its name, whatever else reaches the same.
    for kept in target.corpus.glob("found-*"):
        shutil.copy(kept, new / kept.name)
    shutil.rmtree(target.corpus)
    shutil.move(new, target.corpus)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__.split(";")[0])
    parser.add_argument("target", nargs="*", help="all without")
    parser.add_argument("--seconds", type=int, default=60, help="for each target, 60")
    parser.add_argument("--list", action="store_true", help="name the targets")
    parser.add_argument(
        "--merge",
        action="store_true",
        help=f"do not fuzz, but make {CORPORA.relative_to(NATIVE.parent)}/TARGET anew"
        " of what runs have found",
    )
    return parser.parse_args()


def main() -> int:
    """The command; its exit status."""
    options = arguments()
    known = {target.name: target for target in (*targets(), *python_targets())}
    if options.list:
        print(*known, sep="\n")
        return 0
    unknown = [name for name in options.target if name not in known]
    if unknown:
        print(f"fuzz: no target {unknown[0]!r}; known: {' '.join(known)}", file=sys.stderr)
        return 2
    chosen = [known[name] for name in options.target] or list(known.values())
    try:
        found = ways(chosen)
    except subprocess.CalledProcessError as e:
        print(e.stderr, file=sys.stderr)
        return 1
    failed = False
    for way in found:
        target = way.target
        if options.merge:
            if way.note:
                continue
            merge(target, way.program)
            sizes = [path.stat().st_size for path in target.corpus.iterdir()]
            print(f"{target.name}: {len(sizes)} files, {sum(sizes)} bytes", flush=True)
            continue
        outcome = run(target, way.program, options.seconds)
        failed |= outcome.status != 0
        print(
            f"{way.name}: {outcome.executions} executions, {outcome.executions_per_s}/s,"
            f" {outcome.edges} of {outcome.edges_there} edges",
            flush=True,
        )
        if outcome.status != 0:
            print(outcome.output[-6000:], file=sys.stderr)
            why = f"by the input {outcome.kept}" if outcome.kept else "with no input kept"
            print(f"{way.name}: FAILED, {why}, status {outcome.status}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
