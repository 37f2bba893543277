"""A control group (v2) for a worker, where this process may make one.

It may in the group that it is in, if that hands controllers on, which of those with processes only
the root can; and in the group above if systemd has delegated that (Delegate=yes with
DelegateSubgroup=), where handing them on is left to us. Elsewhere the tree is somebody else's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from avmm.machine.config import Config
from avmm.machine.isolation.files import disks_of
from avmm.machine.isolation.sockets import vsock_of
from avmm.units import MIB
from avmm.vsock.fates import FATES

log = logging.getLogger(__name__)

OVERHEAD_BYTES = 256 * MIB
"""What a worker has beyond the guest's memory: some 30 MiB of its own, and a cache of its files."""

TABLES_SHARE = 32
"""And of the guest's memory: page tables, and KVM's, which may be 2 % where it makes shadows."""

DISK_BYTES = 128 * MIB
"""And for each disk: rings, and copies of data that direct I/O cannot take from the guest."""

STREAM_BYTES = 512 * 1024
"""And for each stream on vsock: what its reader has not taken, here and in the socket."""

GONE_S = 1.0
"""What a group has to be empty when its process has ended, which takes a moment on some kernels."""

_LOOK_S = 0.01
_URING_THREADS = 4  # io_uring's own, for each thread that has rings and each CPU
_DISK_THREADS = 4
_THREADS_EXTRA = 64
_DELEGATED = "user.delegate"


def limits_of(config: Config) -> dict[str, int]:
    """What a worker of this configuration may have, by the files of its group: as much as it can
    come to need. One that gets no more memory is killed, and one without a thread for io_uring has
    requests that fail."""
    disks = len(disks_of(config))
    streams = 0 if vsock_of(config) is None else FATES
    memory = config.memory_bytes + config.memory_bytes // TABLES_SHARE + OVERHEAD_BYTES
    homes = 1 + config.io_threads
    threads = config.cpus + homes * (1 + _URING_THREADS * (os.cpu_count() or 1)) + _THREADS_EXTRA
    return {
        "memory.max": memory + disks * DISK_BYTES + streams * STREAM_BYTES,
        "pids.max": threads + disks * _DISK_THREADS,
    }


class WorkerGroup:
    """One worker's group. Owns the folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def make(cls, name: str, pid: int, limits: Mapping[str, int]) -> WorkerGroup | None:
        """With process `pid` in it; None, and a line in the log, where there can be none."""
        for parent in _parents():
            group = cls(parent / name)
            try:
                group.remove()  # of a program that was killed, and had this id for its worker
                group.path.mkdir()
            except OSError as e:
                log.debug("Control group: %s", e)
                continue
            try:
                for file, value in limits.items():
                    _write(group.path / file, b"%d" % value)
                _write(group.path / "cgroup.procs", b"%d" % pid)
            except OSError as e:
                log.debug("Control group: %s", e)
                group.remove()
            else:
                return group
        log.info("Worker %d has no control group: there is none with memory and pids for it", pid)
        return None

    def killed_for(self) -> str | None:
        """What its process was killed for by the kernel, if that was memory; before remove()."""
        try:
            lines = (self.path / "memory.events").read_text().splitlines()
            events = dict(line.split() for line in lines)
            limit = (self.path / "memory.max").read_text().strip()
        except (OSError, ValueError) as e:
            log.debug("Control group: %s", e)
            return None
        if events.get("oom_kill", "0") == "0":
            return None
        if events.get("oom", "0") == "0":
            return "since there was no memory left, on the host or in a control group above its own"
        mib = f"{int(limit) >> 20} MiB, " if limit.isdecimal() else ""
        return f"since it reached its memory limit, {mib}memory.max of its control group"

    def remove(self) -> bool:
        """When its process has ended; whether it is gone. Idempotent."""
        try:
            self.path.rmdir()
        except OSError as e:
            return isinstance(e, FileNotFoundError)
        return True

    async def removed(self) -> None:
        """Remove it as soon as it is empty; a line in the log when something is still in it."""
        for _ in range(round(GONE_S / _LOOK_S)):
            if self.remove():
                return
            await asyncio.sleep(_LOOK_S)
        log.warning("Control group %s is left: something is still in it", self.path)


def _write(path: Path, value: bytes) -> None:
    """Of a file that is there: the kernel makes them."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value)
    finally:
        os.close(fd)


def _parents() -> Iterator[Path]:
    """Groups in which one may be made, the nearest first."""
    own = own_group()
    if own is None:
        return
    yield own
    with contextlib.suppress(OSError):
        if os.getxattr(own.parent, _DELEGATED) == b"1":
            _write(own.parent / "cgroup.subtree_control", b"+memory +pids")
            yield own.parent


def own_group(process: Path = Path("/proc/self")) -> Path | None:
    """The folder of this process's group in the unified tree; None where that is not mounted."""
    inside = root = point = None
    with contextlib.suppress(OSError):
        for line in (process / "cgroup").read_text().splitlines():
            if line.startswith("0::"):
                inside = line.removeprefix("0::")
        for line in (process / "mountinfo").read_text().splitlines():
            mount, _, filesystem = line.partition(" - ")
            if filesystem.startswith("cgroup2 "):
                root, point = mount.split(" ")[3:5]
    if inside is None or root is None or point is None:
        return None
    return Path(point, os.path.relpath(inside, root))
