"""A program that lives microVMs on a host that refuses, at each call that can be refused.

python -m fakes.failing_start KERNEL FOLDER LOOP TRANSPORT, on a failing_host: prints a line of JSON
for each walk, with what went wrong in it.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import faulthandler
import gc
import json
import logging
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

import avmm
from avmm.block.objects.ram import RamDisk
from fakes.failing_host import Calls, refusing
from linux.holdings import Holdings

_CLONE_NEWNET = 0x40000000

HANGS_S = 60.0
"""Longer than any life takes; a stack of every thread is shown then, and that is the end."""

NEVER = 2**62


@dataclass(frozen=True)
class Walk:
    """A kind of calls and the error they get: once at a time, or from one on for good."""

    calls: Calls
    error: int
    lasting: bool = False

    @property
    def name(self) -> str:
        how = "lasting" if self.lasting else "once"
        return f"{self.calls.name} {errno.errorcode[self.error]} {how}"


WALKS = (
    Walk(Calls.DESCRIPTOR, errno.EMFILE),
    Walk(Calls.DESCRIPTOR, errno.ENFILE, lasting=True),
    Walk(Calls.MEMORY, errno.ENOMEM),
    Walk(Calls.MEMORY, errno.ENOMEM, lasting=True),
    Walk(Calls.THREAD, errno.EAGAIN),
    Walk(Calls.THREAD, errno.EAGAIN, lasting=True),
    Walk(Calls.IOCTL, errno.ENOMEM),
    Walk(Calls.IOCTL, errno.ENOMEM, lasting=True),
    Walk(Calls.WATCH, errno.ENOSPC),
    Walk(Calls.WATCH, errno.ENOMEM, lasting=True),
    Walk(Calls.LOCK, errno.ENOLCK),
    Walk(Calls.LOCK, errno.ENOLCK, lasting=True),
)


@dataclass
class Report:
    """points: failures that were met; ends: by what they became; wrong: what must not be."""

    walk: str
    calls: int = 0
    points: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def has_own_network() -> bool:
    """From now on, where TAPs can be made without touching the machine's."""
    return ctypes.CDLL(None).unshare(_CLONE_NEWNET) == 0 and os.access("/dev/net/tun", os.W_OK)


def machine(kernel: str, folder: Path, transport: str) -> avmm.Config:
    """A bit of everything, on the loop and on an I/O thread."""
    taps = [avmm.Tap("avmm0", host="10.0.0.1/24")] if has_own_network() else []
    for name in ("uring.img", "threads.img"):
        (folder / name).write_bytes(bytes(4096))
    return avmm.Config(
        kernel=kernel,
        memory="3M",
        cmdline="",
        cpus=2,
        disks=[
            avmm.Disk(str(folder / "uring.img"), home="thread", queues=1, queue_size=16),
            avmm.Disk(
                str(folder / "threads.img"), engine="threads", home="loop", queues=1, queue_size=16
            ),
            avmm.AsyncDisk(RamDisk(4096), queue_size=16),
        ],
        nets=[avmm.Nic(), avmm.Nic(home="thread"), *taps],
        vsock=avmm.Vsock(uds=str(folder / "vsock")),
        ports=avmm.Ports(["one"]),
        console=True,
        rng=True,
        io_threads=1,
        transport=transport,  # type: ignore[arg-type]
    )


async def live(config: avmm.Config) -> None:
    """Start, hear of the guest, turn it off and on, end."""
    async with avmm.MicroVM(config) as vm:
        await vm.serial.expect(b"x")
        await vm.pause()
        await vm.resume()


async def meet(walk: Walk, at: int, config: avmm.Config, report: Report) -> bool:
    """One life with one failure; whether it was met."""
    before = Holdings.now()
    end = "lived"
    with refusing(walk.calls, at, walk.error, lasting=walk.lasting) as refusals:
        try:
            await live(config)
        except avmm.AvmmError as e:
            end = f"{type(e).__name__} {e.kind}"
        except BaseException as e:
            end = f"{type(e).__name__} {e}"
            report.wrong.append(f"call {at}: {end}")
    report.calls = max(report.calls, refusals.seen)
    if not refusals.failed:
        return False
    report.points += 1
    report.ends[end] += 1
    if left := Holdings.now().beyond(before):
        gc.collect()  # what a traceback of another library still holds
        left = Holdings.now().beyond(before)
    left |= {repr(task): 1 for task in asyncio.all_tasks() - {asyncio.current_task()}}
    if left:
        report.wrong.append(f"call {at}: {end}, and left {left}")
    return True


async def take(walk: Walk, config: avmm.Config) -> Report:
    """Life after life, each with a later failure, until one meets none."""
    report = Report(walk.name)
    await meet(walk, NEVER, config, report)
    at = 1
    faulthandler.dump_traceback_later(HANGS_S, exit=True)
    while await meet(walk, at, config, report):
        faulthandler.dump_traceback_later(HANGS_S, exit=True)
        at += 1
    faulthandler.cancel_dump_traceback_later()
    return report


async def main(kernel: str, folder: str, transport: str) -> None:
    config = machine(kernel, Path(folder), transport)
    await live(config)  # what is made once a process, and imported
    for walk in WALKS:
        print(json.dumps(vars(await take(walk, config))))


if __name__ == "__main__":
    logging.disable()  # each failure is told, and told again
    _, kernel, folder, loop, transport = sys.argv
    factory = uvloop.new_event_loop if loop == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main(kernel, folder, transport))
