"""A control group (v2) for a worker, where this process may make one.

It may in the group that it is in, if that hands controllers on, and in the group above if systemd
has delegated that (Delegate=yes with DelegateSubgroup=). Elsewhere the tree is somebody else's.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from avmm.machine.config import Config
from avmm.units import MIB

log = logging.getLogger(__name__)

OVERHEAD_BYTES = 256 * MIB
"""What a worker has beyond the guest's memory: some 30 MiB of its own, and a cache of its files."""

_THREADS_EXTRA = 64
_DELEGATED = "user.delegate"


def limits_of(config: Config) -> dict[str, int]:
    """What a worker of this configuration may have, by the files of its group."""
    return {
        "memory.max": config.memory_bytes + OVERHEAD_BYTES,
        "pids.max": config.cpus + config.io_threads + _THREADS_EXTRA,
    }


class WorkerGroup:
    """One worker's group. Owns the folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def make(cls, name: str, pid: int, limits: Mapping[str, int]) -> WorkerGroup | None:
        """With process `pid` in it; None, and a line in the log, where there can be none."""
        for parent in _parents():
            path = parent / name
            try:
                path.mkdir()
            except OSError:
                continue
            group = cls(path)
            try:
                for file, value in limits.items():
                    _write(path / file, value)
                _write(path / "cgroup.procs", pid)
            except OSError as e:
                log.debug("Control group %s: %s", path, e)
                group.remove()
            else:
                return group
        log.info("Worker %d has no control group: there is none with memory and pids for it", pid)
        return None

    def remove(self) -> None:
        """When its process has ended. Idempotent."""
        with contextlib.suppress(OSError):
            self.path.rmdir()


def _write(path: Path, value: int) -> None:
    """Of a file that is there: the kernel makes them."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, b"%d" % value)
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
