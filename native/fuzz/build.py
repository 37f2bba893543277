"""Builds the fuzz targets: with libFuzzer by clang to find inputs, and with a main that replays
files by any compiler that has sanitizers.

A target is native/fuzz/target_NAME.c, and its name NAME; tests/corpora/NAME holds its inputs. It is
linked with the other sources of this folder and with the library it is a door to: the shim, or
native/agent when NAME begins with "agent".
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parent
CORPORA = NATIVE.parent / "tests/corpora"

PYTHON_TARGETS = NATIVE.parent / "tests/fakes/parser_targets.py"
PREFIX = "target_"
REPLAY = HERE / "replay.c"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREAD_SANITIZER = ("-fsanitize=thread",)


@dataclass(frozen=True)
class Target:
    """parsers: the library whose coverage counts. helpers: what targets of a kind share.
    threads: it has threads, and so the host's real clock."""

    name: str
    source: Path
    parsers: tuple[Path, ...]
    helpers: tuple[Path, ...]
    threads: bool = False
    is_python: bool = False
    link: tuple[str, ...] = ("-luring", "-lpthread")

    @property
    def corpus(self) -> Path:
        """Where its committed inputs are."""
        return CORPORA / self.name


@dataclass(frozen=True)
class Toolchain:
    """How sources are compiled: `coverage` is for parsers, `engine` links what runs a target."""

    compiler: str
    options: tuple[str, ...]
    coverage: tuple[str, ...] = ()
    engine: tuple[str, ...] = ()
    main: tuple[Path, ...] = ()


# What parsers call of the host that an input is to decide, as fuzz_NAME() does instead.
REPLACED = ("clock_gettime", "clock_settime", "time", "getrandom", "mmap", "munmap")
REPLACED += ("kill", "_exit", "connect")


def fuzzing(sanitizers: Sequence[str]) -> Toolchain:
    """Programs that are libFuzzer."""
    return Toolchain(
        "clang",
        ("-O1", "-Wall", "-Wextra", "-Wshadow", "-Werror", *sanitizers),
        coverage=("-fsanitize=fuzzer-no-link",),
        engine=("-fsanitize=fuzzer",),
    )


def replaying(compiler: str, sanitizers: Sequence[str]) -> Toolchain:
    """Programs that take files and give each to the target."""
    return Toolchain(compiler, ("-O0", *sanitizers), main=(REPLAY,))


def targets() -> list[Target]:
    """All there are, by name."""
    shared = sorted({*HERE.glob("*.c")} - {REPLAY, *HERE.glob(f"{PREFIX}*.c")})
    agent = sorted({*NATIVE.glob("agent/*.c")} - {NATIVE / "agent/main.c"})
    few = (HERE / "input.c", HERE / "replaced.c")
    shim = sorted(NATIVE.glob("*.c"))
    found = []
    for source in sorted(HERE.glob(f"{PREFIX}*.c")):
        name = source.stem.removeprefix(PREFIX)
        if name.startswith("agent"):
            found.append(Target(name, source, tuple(agent), few))
        else:
            threads = name.startswith("state")
            found.append(Target(name, source, tuple(shim), tuple(shared), threads=threads))
    return found


def python_targets() -> list[Target]:
    """Those of what Python parses, by name."""
    names = sorted(re.findall(r'^    "(py_\w+)":', PYTHON_TARGETS.read_text(), re.MULTILINE))
    return [Target(name, PYTHON_TARGETS, (), (), is_python=True) for name in names]


def build(chosen: Sequence[Target], toolchain: Toolchain, folder: Path) -> dict[str, Path]:
    """A program for each target, by its name; what is up to date in `folder` stays.

    Raises subprocess.CalledProcessError with the compiler's words in `stderr`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {key for target in chosen for key in _sources(target, toolchain)}
    headers = (Path(__file__), *NATIVE.rglob("*.h"))
    newest = max(path.stat().st_mtime for path in headers)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {
            key: pool.submit(_compile, key, toolchain, folder, newest) for key in sorted(wanted)
        }
        objects = {key: job.result() for key, job in jobs.items()}
        links = [pool.submit(_link, target, toolchain, objects, folder) for target in chosen]
        return {target.name: link.result() for target, link in zip(chosen, links, strict=True)}


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


Key = tuple[Path, str]
"""A source, and as what it is compiled: "helper", "parser" on the input's host, or "real"."""


def _sources(target: Target, toolchain: Toolchain) -> list[Key]:
    """What is linked: the target itself and main first, then what goes into the archive."""
    parser = "real" if target.threads else "parser"
    own = [(path, "helper") for path in (target.source, *toolchain.main)]
    library = [(path, parser) for path in target.parsers]
    return own + library + [(path, "helper") for path in target.helpers]


def _compile(key: Key, toolchain: Toolchain, folder: Path, newest: float) -> Path:
    source, role = key
    made = folder / ("-".join(source.relative_to(NATIVE).parts) + f".{role}.o")
    extra = () if role == "helper" else toolchain.coverage
    if role == "parser":
        extra += tuple(f"-D{name}=fuzz_{name}" for name in REPLACED)
    if source.name.startswith(PREFIX):  # it may include a source
        newest = max(path.stat().st_mtime for path in NATIVE.rglob("*.c"))
    if made.exists() and made.stat().st_mtime > max(newest, source.stat().st_mtime):
        return made
    options = ("-std=gnu11", "-g", f"-I{NATIVE}")
    command = [toolchain.compiler, *options, *toolchain.options, *extra]
    _run([*command, "-c", str(source), "-o", str(made)])
    return made


def _link(target: Target, toolchain: Toolchain, objects: dict[Key, Path], folder: Path) -> Path:
    """All but the target itself goes in by an archive: only what it reaches."""
    program = folder / f"fuzz-{target.name}"
    archive = program.with_suffix(".a")
    archive.unlink(missing_ok=True)
    made = [str(objects[key]) for key in _sources(target, toolchain)]
    count = 1 + len(toolchain.main)
    own, library = made[:count], made[count:]
    _run(["ar", "rcsT", str(archive), *library])
    options = (*toolchain.options, *toolchain.engine)
    command = [toolchain.compiler, *options, *own, str(archive), *target.link]
    _run([*command, "-o", str(program)])
    return program
