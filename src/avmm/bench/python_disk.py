"""Rows of suite embed: a disk written in Python, at native speed, with no VM.

A RAM disk of ours behind vhost-user, in a process of its own whose event loop does all of it: the
rings, the parser and the object's coroutines. The driver is the one of suite blk-native.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator

from avmm.bench.back_end import BackEnd
from avmm.bench.load import BlkWork, Run, costs, run_blk
from avmm.bench.record import GOAL, OWN, Aim, Case
from avmm.bench.suite import Options
from avmm.block.objects.ram import RamDisk
from avmm.loop import run as run_loop
from avmm.units import KIB, MIB
from avmm.vhost_user.server import VhostUserServer
from avmm.virtio.devices.blk_source import AsyncDisk

DISK_BYTES = 256 * MIB
IOPS_GOAL = 50_000.0

ROWS = (
    ("4k randread QD1", BlkWork(4 * KIB, 1), None),
    ("4k randread QD32", BlkWork(4 * KIB, 32), IOPS_GOAL),
    ("4k randwrite QD32", BlkWork(4 * KIB, 32, write=True), IOPS_GOAL),
    ("256k read QD8", BlkWork(256 * KIB, 8, sequential=True), None),
    ("256k write QD8", BlkWork(256 * KIB, 8, write=True, sequential=True), None),
)


def cases(suite: str, options: Options) -> Iterator[Case]:
    """See the suite protocol. Needs no rights."""
    with tempfile.TemporaryDirectory(prefix="avmm-bench-") as folder:
        path = os.path.join(folder, "disk.sock")
        command = [sys.executable, "-m", "avmm.bench.python_disk", path]
        with BackEnd(OWN, command, path) as back_end:
            # That it stores and returns the right data, before its speed is worth anything.
            for work in (BlkWork(4 * KIB, 32, write=True), BlkWork(256 * KIB, 8, sequential=True)):
                requests = DISK_BYTES // work.block_bytes // 4
                span = {"span_bytes": DISK_BYTES // 4, "requests": requests}
                run_blk(back_end, _sequential(work), verify=True, **span)
            for name, work, goal in ROWS:
                runs = [
                    run_blk(back_end, work, span_bytes=DISK_BYTES, seconds=options.seconds)
                    for _ in range(options.runs)
                ]
                yield _case(suite, name, runs, goal)


def _sequential(work: BlkWork) -> BlkWork:
    return BlkWork(work.block_bytes, work.depth, write=work.write, sequential=True)


def _case(suite: str, name: str, runs: list[Run], goal: float | None) -> Case:
    series = {OWN: [run.rate for run in runs]}
    aims = []
    if goal is not None:
        series[GOAL] = [goal]
        aims.append(Aim(GOAL, 1.0))
    return Case(
        suite=suite,
        name=f"Python RAM disk, {name}",
        unit="IOPS",
        better="higher",
        series=series,
        aims=aims,
        costs={OWN: costs(runs)},
    )


async def _serve(path: str) -> None:
    disk = AsyncDisk(RamDisk(DISK_BYTES))
    async with VhostUserServer(disk, path, io_threads=0) as server:
        await server.wait()


if __name__ == "__main__":
    run_loop(_serve(sys.argv[1]))
