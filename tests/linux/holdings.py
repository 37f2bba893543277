"""What this process holds of its machine, to be compared before and after."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from avmm.machine.isolation.cgroup import own_group

SHARED_MAPPINGS = ("memfd:", "anon_inode:")  # guest memory; vCPU and io_uring rings
LOOPS_WORKERS = ("asyncio_", "uvloop_")


@dataclass(frozen=True)
class Holdings:
    """Counted by name, so that a leak says what it is."""

    counts: Counter[str]

    @classmethod
    def now(cls) -> Self:
        """All that is held at this moment."""
        parts = (_descriptors, _mappings, _memory, _threads, _children, _devices, _groups)
        return cls(sum((part() for part in parts), Counter()))

    def beyond(self, before: Self) -> dict[str, int]:
        """What is held now and was not before."""
        return dict(self.counts - before.counts)


def _descriptors() -> Counter[str]:
    names: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        try:
            # Without the number of a pipe or socket: a loop makes its own anew for each run.
            name = os.readlink(f"/proc/self/fd/{fd}")
            names["descriptor " + re.sub(r":\[\d+\]", "", name)] += 1
        except FileNotFoundError:
            continue  # the one listdir() itself had open
    return names


def _mappings() -> Counter[str]:
    names: Counter[str] = Counter()
    for line in Path("/proc/self/maps").read_text().splitlines():
        words = line.split(maxsplit=5)
        if len(words) == 6 and any(part in words[5] for part in SHARED_MAPPINGS):
            names[f"mapping {words[5]}"] += 1
    return names


def _memory() -> Counter[str]:
    """Guest memory: anonymous, and the only memory of ours that asks for huge pages."""
    kib, total = 0, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "Size":
            kib = int(rest.split()[0])
        elif name == "VmFlags" and "hg" in rest.split():
            total += kib
    return Counter({"KiB of guest memory": total})


def _threads() -> Counter[str]:
    """By name; an event loop keeps its own pool of workers until it closes."""
    names = (thread.name for thread in threading.enumerate())
    return Counter(f"thread {name}" for name in names if not name.startswith(LOOPS_WORKERS))


def _children() -> Counter[str]:
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return Counter(f"child {pid}" for pid in pids)


def _devices() -> Counter[str]:
    return Counter(f"network device {name}" for _, name in socket.if_nameindex())


def _groups() -> Counter[str]:
    """Workers' control groups, and no others' whose worker is alive."""
    own = own_group()
    groups = [] if own is None else own.glob("avmm-*/cgroup.procs")
    return Counter(f"control group {file.parent}" for file in groups if not file.read_text())
