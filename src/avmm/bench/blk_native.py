"""Suite blk-native: block back-ends over vhost-user at native speed, with no VM.

Ours and qemu-storage-daemon's serve the same file, which is in the page cache, to the same driver;
they take turns. A driver of one queue has a processor to itself. The limit is fio with io_uring on
the bare file, its buffers and file registered.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from avmm.bench.back_end import AVMM_COMMAND, BackEnd, tool
from avmm.bench.front_end import FrontEnd
from avmm.bench.load import BlkWork, Run, costs, run_blk
from avmm.bench.record import LIMIT, OWN, Aim, Case
from avmm.bench.suite import Options
from avmm.errors import HostError
from avmm.native import ffi, lib
from avmm.units import GIB, KIB, MIB, PAGE_BYTES, SECTOR_BYTES

SUITE = "blk-native"
PEER = "qemu-storage-daemon"

FOLDER = "/var/tmp"
"""On a disk, where /tmp may be memory: a file system's page cache is what is compared."""

DISK_BYTES = 1 * GIB
QUEUES_MAX = 2

_CHECKED_BYTES = 64 * MIB


@dataclass(frozen=True, slots=True)
class Row:
    """One case. cpu_aim: our CPU time a request by the peer's, a case of its own."""

    name: str
    work: BlkWork
    aims: tuple[Aim, ...] = ()
    cpu_aim: float | None = None


def rows() -> list[Row]:
    """Reads first: they leave nothing behind that the disk is busy with later."""
    found: list[Row] = []
    for write in (False, True):
        for queues in range(1, QUEUES_MAX + 1):
            for depth in (1, 4, 32, 128):
                # With a polling driver more queues than spare processors measure the scheduler.
                for polling in (False, True) if queues == 1 else (False,):
                    work = BlkWork(4 * KIB, depth, queues, write, polling=polling)
                    found.append(_row(work))
        if not write:
            for polling in (False, True):
                work = BlkWork(256 * KIB, 8, sequential=True, polling=polling)
                found.append(Row(_name(work), work, (Aim(PEER, 1.1),)))
    return found


def _row(work: BlkWork) -> Row:
    aims: list[Aim] = []
    cpu_aim = None
    if work.queues == 1 and (work.depth == 32 or (work.depth == 1 and not work.write)):
        aims.append(Aim(PEER, 1.5))
    if work.queues == 1 and work.depth == 32:
        cpu_aim = None if work.polling else 0.8
        if not work.write:
            aims.append(Aim(LIMIT, 0.75))
    return Row(_name(work), work, tuple(aims), cpu_aim)


def _name(work: BlkWork) -> str:
    kind = ("seq" if work.sequential else "rand") + ("write" if work.write else "read")
    plural = "s" if work.queues > 1 else ""
    how = "polled" if work.polling else "event"
    size = f"{work.block_bytes // KIB}k"
    return f"{size} {kind} QD{work.depth} {work.queues} queue{plural} {how}"


def cases(options: Options) -> Iterator[Case]:
    """See the suite protocol. Needs no rights but to write FOLDER."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="avmm-bench-", dir=FOLDER))
        disk = os.path.join(folder, "disk.img")
        options.say(f"{SUITE}: writing {disk}")
        fill(disk, DISK_BYTES)
        back_ends = _start(stack, options, folder, disk)
        fio = _fio(options)
        if not back_ends:
            raise HostError("back-end", op=SUITE, remedy="no back-end could be started")
        limits: dict[BlkWork, list[Run]] = {}
        for row in rows():
            yield from _measure(row, options, back_ends, fio, disk, limits)


def fill(path: str, size_bytes: int) -> None:
    """A file whose sectors bear their stamps, on the disk and in the page cache.

    Written page by page: larger writes leave the page cache in pieces of up to 2 MiB, in each of
    which ext4 (Linux 6.18) looks at every block for every 4 KiB written, ten times as much work as
    the rest of the write. That would be all that the write rows measure.
    """
    chunk = bytearray(min(size_bytes, 8 * MIB))
    view = memoryview(chunk)
    data = ffi.from_buffer("uint8_t[]", chunk)
    with open(path, "wb", buffering=0) as file:
        for begin in range(0, size_bytes, len(chunk)):
            lib.av_load_stamp_sectors(data, len(chunk), begin // SECTOR_BYTES)
            for at in range(0, len(chunk), PAGE_BYTES):
                file.write(view[at : at + PAGE_BYTES])
        os.fsync(file.fileno())


def _start(stack: ExitStack, options: Options, folder: str, disk: str) -> list[BackEnd]:
    """Ours, then the peer, each checked; who cannot take part is left out."""
    found: list[BackEnd] = []
    for name, command in (
        (OWN, own_command),
        (PEER, peer_command),
    ):
        if name != OWN and not options.wants(name):
            continue
        path = os.path.join(folder, f"{name}.sock")
        try:
            back_end = stack.enter_context(BackEnd(name, command(path, disk), path))
            _check(back_end)
        except HostError as e:
            options.leave_out(f"{SUITE}: {name}: {e}")
        else:
            found.append(back_end)
    return found


def own_command(path: str, disk: str) -> list[str]:
    """Ours, its queues on native threads."""
    return [
        *(*AVMM_COMMAND, "vhost-user", "blk", "--socket", path, "--disk", disk),
        *("--num-queues", str(QUEUES_MAX), "--io-threads", str(QUEUES_MAX)),
    ]


def peer_command(path: str, disk: str) -> list[str]:
    """QEMU's, with io_uring and a thread of its own."""
    daemon = tool("qemu-storage-daemon", "qemu-system-common")
    return [
        *(daemon, "--object", "iothread,id=io0"),
        "--blockdev",  # without its lock, since ours holds one on the same file
        f"driver=file,node-name=d0,filename={disk},aio=io_uring,cache.direct=off,locking=off",
        "--export",
        f"type=vhost-user-blk,id=e0,node-name=d0,addr.type=unix,addr.path={path},"
        f"writable=on,iothread=io0,num-queues={QUEUES_MAX}",
    ]


def _check(back_end: BackEnd) -> None:
    """That it stores and returns the right data, before its speed is worth anything."""
    for work in (
        BlkWork(4 * KIB, 32, write=True),
        BlkWork(256 * KIB, 8, sequential=True),
        BlkWork(4 * KIB, 16, min(QUEUES_MAX, queues_max(back_end))),
    ):
        requests = _CHECKED_BYTES // work.block_bytes // work.queues
        run_blk(back_end, work, span_bytes=_CHECKED_BYTES, requests=requests, verify=True)


def queues_max(back_end: BackEnd) -> int:
    """How many queues it has."""
    with FrontEnd(back_end.path, queues=1, data_bytes=PAGE_BYTES) as front:
        return front.queues_max


def _measure(
    row: Row,
    options: Options,
    back_ends: list[BackEnd],
    fio: str | None,
    disk: str,
    limits: dict[BlkWork, list[Run]],
) -> Iterator[Case]:
    """The row's case, and that of its CPU time. limits: fio's runs, which do not depend on how
    the driver waits."""
    work = row.work
    back_ends = [one for one in back_ends if work.queues == 1 or work.queues <= queues_max(one)]
    runs: dict[str, list[Run]] = {back_end.name: [] for back_end in back_ends}
    bare = BlkWork(work.block_bytes, work.depth, work.queues, work.write, work.sequential)
    known = bare in limits
    for _ in range(options.runs):
        for back_end in back_ends:
            measured = run_blk(back_end, work, span_bytes=DISK_BYTES, seconds=options.seconds)
            runs[back_end.name].append(measured)
        if fio is not None and not known:
            limits.setdefault(bare, []).append(run_fio(fio, bare, disk, options.seconds))
    if work.write:
        _settle(disk)
    if bare in limits:
        runs[LIMIT] = limits[bare]
    yield Case(
        suite=SUITE,
        name=row.name,
        unit="IOPS",
        better="higher",
        series={name: [run.rate for run in some] for name, some in runs.items()},
        aims=list(row.aims),
        costs={name: costs(some) for name, some in runs.items()},
    )
    if row.cpu_aim is not None:
        yield Case(
            suite=SUITE,
            name=f"{row.name}: CPU time",
            unit="s/request",
            better="lower",
            series={
                name: [run.cpu_s_per_request for run in some if run.cpu_s_per_request is not None]
                for name, some in runs.items()
            },
            aims=[Aim(PEER, row.cpu_aim)],
        )


def _settle(disk: str) -> None:
    """Write out what the row left dirty: it is not to slow down the next one."""
    fd = os.open(disk, os.O_RDWR)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


def _fio(options: Options) -> str | None:
    try:
        return tool("fio", "fio")
    except HostError as e:
        options.leave_out(f"{SUITE}: {LIMIT}: {e}")
        return None


def run_fio(fio: str, work: BlkWork, disk: str, seconds: float) -> Run:
    """The same work by fio on the bare file, a job for each queue."""
    kind = ("" if work.sequential else "rand") + ("write" if work.write else "read")
    command = [
        *(fio, "--name=limit", f"--filename={disk}", f"--rw={kind}", f"--bs={work.block_bytes}"),
        *(f"--iodepth={work.depth}", f"--numjobs={work.queues}", "--group_reporting", "--thread"),
        *("--ioengine=io_uring", "--registerfiles=1", "--fixedbufs=1", "--invalidate=0"),
        *("--time_based", f"--runtime={round(seconds * 1000)}ms", f"--size={DISK_BYTES}"),
        *("--norandommap", "--randrepeat=0", "--output-format=json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(disk).parent)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise HostError("tool", op="fio", remedy=words[-1])
    job = json.loads(done.stdout)["jobs"][0]
    side = job["write" if work.write else "read"]
    busy = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000
    return Run(
        rate=float(side["iops"]),
        cpu_s_per_request=busy / max(1, int(side["total_ios"])),
        p50_s=side["clat_ns"]["percentile"]["50.000000"] / 1e9,
        p99_s=side["clat_ns"]["percentile"]["99.000000"] / 1e9,
    )
