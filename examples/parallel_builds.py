"""Builds in parallel, each in a microVM: sources go up, a script runs, artefacts come down.

Usage: python examples/parallel_builds.py KERNEL INITRD

A build that fails shows what it printed, and the others go on. The builds here need nothing but a
shell and busybox; with a compiler in the initrd, or on a disk, they could be `make`.
"""

from __future__ import annotations

import asyncio
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import avmm

AT_ONCE = 2
BOOT_LIMIT_S = 300.0
BUILD_LIMIT_S = 120.0


@dataclass(frozen=True)
class Build:
    """sources: content by name; script: run by `sh -e` beside them; artefacts: what it makes."""

    name: str
    sources: dict[str, bytes]
    script: str
    artefacts: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """output: stdout and stderr in one; artefacts: where they are now, none of a failed build."""

    build: Build
    status: int
    output: str
    artefacts: tuple[Path, ...] = ()


BUILDS = [
    Build(
        name="archive",
        sources={"hello.txt": b"hello\n", "world.txt": b"world\n"},
        script="tar -czf both.tar.gz *.txt; sha256sum both.tar.gz >both.sum",
        artefacts=("both.tar.gz", "both.sum"),
    ),
    Build(
        name="broken",
        sources={"main.c": b"int main(void) { return 0 }\n"},
        script="grep -n 'return 0;' main.c || { echo 'main.c:1: no semicolon' >&2; exit 2; }",
        artefacts=("main",),
    ),
]


async def build_all(config: avmm.Config, builds: list[Build], folder: Path) -> list[Result]:
    """Run all builds, AT_ONCE at a time; what cannot be built at all ends the others."""
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(build: Build) -> Result:
        async with turn:
            return await run_build(config, build, folder)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(build)) for build in builds]
    return [task.result() for task in tasks]


async def run_build(config: avmm.Config, build: Build, folder: Path) -> Result:
    """One build, in a guest that is gone afterwards."""
    async with avmm.MicroVM(config) as vm:
        await vm.agent.ready(timeout=BOOT_LIMIT_S)
        await vm.files.mkdir("/build")
        for name, content in build.sources.items():
            await vm.files.write(f"/build/{name}", content)
        done = await vm.run(
            ["sh", "-e", "-c", build.script],
            cwd="/build",
            stderr=asyncio.subprocess.STDOUT,
            timeout=BUILD_LIMIT_S,
        )
        output = done.stdout.decode(errors="replace")
        if done.returncode != 0:
            return Result(build, done.returncode, output)
        targets = tuple(folder / f"{build.name}-{name}" for name in build.artefacts)
        for name, target in zip(build.artefacts, targets, strict=True):
            await vm.files.download(f"/build/{name}", target)
        return Result(build, 0, output, targets)


def show(result: Result) -> None:
    """Print what came of a build."""
    if result.status == 0:
        sizes = (f"{path.name} ({path.stat().st_size} bytes)" for path in result.artefacts)
        print(f"{result.build.name}: {', '.join(sizes)}")
    else:
        print(f"{result.build.name}: failed with status {result.status}")
        print("".join(f"    {line}\n" for line in result.output.splitlines()), end="")


async def main(kernel: str, initrd: str) -> None:
    """Run BUILDS and look at what they made."""
    config = avmm.Config(kernel=kernel, initrd=initrd, cmdline="console=ttyS0 quiet", agent=True)
    with tempfile.TemporaryDirectory() as folder:
        archive, broken = await build_all(config, BUILDS, Path(folder))
        show(archive)
        show(broken)
        with tarfile.open(archive.artefacts[0]) as tar:
            if tar.getnames() != ["hello.txt", "world.txt"]:
                raise RuntimeError(f"the archive has {tar.getnames()}")
        if (broken.status, broken.output) != (2, "main.c:1: no semicolon\n"):
            raise RuntimeError(f"the broken build: {broken}")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
