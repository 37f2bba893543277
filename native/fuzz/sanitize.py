"""Runs the native code under sanitizers: call it by `scripts/test --sanitize`.

Twice, once with address and undefined-behaviour sanitizers and once with ThreadSanitizer: the fuzz
targets with their committed inputs, those with threads many times, and those unit tests that use
the shim, with a shim built so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from build import NATIVE, SANITIZERS, THREAD_SANITIZER, build, replaying, targets

ROOT = NATIVE.parent
WORK = ROOT / "build/sanitize"
TESTS = (
    *("virtio/test_home.py", "virtio/test_blk_device.py", "virtio/test_blk_queues.py"),
    *("virtio/test_net_device.py", "virtio/test_rng.py", "virtio/test_limit.py"),
    *("vsock/test_splice.py", "hostnet"),
)
"""Of tests/unit: those whose native code has threads, or memory of its own."""

# What threads do differs from run to run, so one is not enough.
REPEATS = 10
TIMEOUT_S = 900


@dataclass(frozen=True)
class Kind:
    """runtime: what the interpreter, which is not built so, has to load first. environment: for
    it, with what is left out and why."""

    name: str
    options: tuple[str, ...]
    runtime: str
    environment: dict[str, str]


KINDS = (
    # Leaks: the interpreter frees little of its own at exit. Our own are found by the targets,
    # which are no Python, and by the tests that count descriptors, threads and mappings.
    Kind("address", SANITIZERS, "libasan.so", {"ASAN_OPTIONS": "detect_leaks=0"}),
    # Its locks are not in order of acquisition, and they are Python's: of deadlocks only those of
    # the targets are looked for. And what it copies by libc are the tests' writes of guest memory,
    # which races by its nature; all that is built so is still watched.
    Kind(
        "thread",
        THREAD_SANITIZER,
        "libtsan.so",
        {
            "TSAN_OPTIONS": "halt_on_error=1:detect_deadlocks=0:exitcode=66:"
            "ignore_noninstrumented_modules=1"
        },
    ),
)


def replay(kind: Kind) -> int:
    """Give each target its committed inputs; how many failed."""
    chosen, failed = targets(), 0
    programs = build(chosen, replaying("gcc", kind.options), WORK / kind.name / "programs")
    for target in chosen:
        inputs = sorted(map(str, target.corpus.iterdir()))
        for _ in range(REPEATS if target.threads else 1):
            ended = subprocess.run(
                [programs[target.name], *inputs],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT_S,
            )
            if ended.returncode != 0:
                print(ended.stderr[-6000:], file=sys.stderr)
                print(f"{kind.name}: {target.name}: FAILED, status {ended.returncode}")
                failed += 1
                break
    print(f"{kind.name}: {len(chosen) - failed} targets passed, {failed} failed", flush=True)
    return failed


def build_shim(kind: Kind) -> Path:
    """The package with a shim of this kind; the folder it is in."""
    sources, folder = WORK / kind.name / "source", WORK / kind.name / "package"
    shutil.rmtree(folder, ignore_errors=True)
    sources.mkdir(parents=True, exist_ok=True)
    options = " ".join((*kind.options, "-O1", "-fno-omit-frame-pointer"))
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(sources)]
    subprocess.run(
        [*command, "--build-lib", str(folder)],
        cwd=ROOT,
        env=os.environ | {"CFLAGS": options, "LDFLAGS": " ".join(kind.options)},
        check=True,
        capture_output=True,
        text=True,
    )
    return folder


def run_tests(kind: Kind) -> int:
    """The unit tests that use the shim; 0 when they passed."""
    package = build_shim(kind)
    named = subprocess.run(
        ["gcc", f"-print-file-name={kind.runtime}"], check=True, capture_output=True, text=True
    )
    environment = {"PYTHONPATH": str(package), "LD_PRELOAD": named.stdout.strip()}
    # A report ends the process, and what pytest has captured of it would be lost.
    command = [sys.executable, "-m", "pytest", "-q", "--capture=sys"]
    command += ["-p", "no:cacheprovider", "-m", "not slow"]
    ended = subprocess.run(
        [*command, *(f"tests/unit/{name}" for name in TESTS)],
        cwd=ROOT,
        env=os.environ | kind.environment | environment,
    )
    print(f"{kind.name}: tests ended with status {ended.returncode}", flush=True)
    return ended.returncode


def main() -> int:
    """The command; its exit status."""
    try:
        return int(any([replay(kind) + run_tests(kind) for kind in KINDS]))
    except subprocess.CalledProcessError as e:
        print(e.stderr, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
