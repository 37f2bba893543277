"""What a VMM's process has cost so far: CPU time, exits, interrupts, its own counters."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

_KVM = Path("/sys/kernel/debug/kvm")
_STAT_UTIME, _STAT_STIME = 11, 12  # of /proc/PID/stat, counted after the command's name


@dataclass(frozen=True, slots=True)
class Sample:
    """Totals since the process began. cpu_s: of all its threads, vCPUs and the kernel's vhost
    threads for it included. exits: KVM's count; None where debugfs does not tell."""

    cpu_s: float
    exits: int | None


def virtual_machines() -> frozenset[str]:
    """KVM's names of those that exist, on the whole host; none where debugfs does not tell."""
    try:
        return frozenset(name for name in os.listdir(_KVM) if "-" in name)
    except OSError:
        return frozenset()


class Meter:
    """Reads one VMM's totals; cheap enough for the moment between two rows.

    others: virtual machines from before this process. What came later is its own: KVM's names
    hold process numbers, but those of the host, which a namespace does not know.
    """

    def __init__(self, pid: int, others: frozenset[str]) -> None:
        self._pid = pid
        self._others = others
        self._ticks = os.sysconf("SC_CLK_TCK")
        self._vhost: list[int] | None = None

    def sample(self) -> Sample:
        """The totals now; OSError when the process is gone."""
        if self._vhost is None:
            self._vhost = self._vhost_threads()
        ticks = sum(_ticks_of(pid) for pid in (self._pid, *self._vhost))
        return Sample(ticks / self._ticks, self._exits())

    def rss_beyond_guest_bytes(self, memory_mib: int) -> int:
        """Resident memory of all mappings but the guest's RAM, which is the one of that size."""
        total_kib = size_kib = 0
        for line in Path(f"/proc/{self._pid}/smaps").read_text().splitlines():
            if line.startswith("Size:"):
                size_kib = int(line.split()[1])
            elif line.startswith("Rss:"):
                ram = memory_mib * 1024 <= size_kib <= (memory_mib + 4) * 1024
                total_kib += 0 if ram else int(line.split()[1])
        return total_kib * 1024

    def _vhost_threads(self) -> list[int]:
        """vhost's workers are threads of the kernel, named after the process they serve."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):  # it ended meanwhile
                    if (entry / "comm").read_text().strip() == f"vhost-{self._pid}":
                        found.append(int(entry.name))
        return found

    def _exits(self) -> int | None:
        found = virtual_machines() - self._others
        try:
            return sum(int((_KVM / name / "exits").read_text()) for name in found) or None
        except OSError:
            return None


def _ticks_of(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[_STAT_UTIME]) + int(fields[_STAT_STIME])
