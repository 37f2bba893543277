"""From a process's start to a guest's user space, and the memory that takes."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from avmm.bench.guest import ground
from avmm.bench.guest.contenders import AVMM, KVMTOOL, QEMU, QEMU_MICROVM, Disk, Machine
from avmm.bench.guest.kit import Kit
from avmm.bench.guest.session import Boot, boot
from avmm.bench.guest.turns import TAP, again, taking_part
from avmm.bench.record import BEST, Aim, Case
from avmm.bench.suite import Options
from avmm.units import MIB

SUITE = "boot-guest"
CONTENDERS = (AVMM, QEMU, QEMU_MICROVM, KVMTOOL)
_CPUS, _MEMORY_MIB, _DISK_BYTES = 2, 512, 64 * MIB
_CMDLINE = "console=ttyS0 quiet avmm.cmd=dHJ1ZQ=="  # true


@dataclass(frozen=True, slots=True)
class _Figure:
    name: str
    unit: str
    get: Callable[[Boot], float | None]
    better: Literal["higher", "lower"] = "lower"
    aims: tuple[Aim, ...] = ()


def _cpu_s(seen: Boot) -> float | None:
    return None if seen.sample is None else seen.sample.cpu_s


def _exits(seen: Boot) -> float | None:
    return None if seen.sample is None else seen.sample.exits


_FIGURES = (
    _Figure("start to KVM_RUN", "s", lambda seen: seen.kvm_run_s),
    _Figure("start to first console byte", "s", lambda seen: seen.first_byte_s),
    _Figure("start to user space", "s", lambda seen: seen.user_space_s, aims=(Aim(BEST, 1.0),)),
    _Figure("guest's own clock at user space", "s", lambda seen: seen.guest_uptime_s),
    _Figure("CPU time until user space", "s", _cpu_s),
    _Figure("exits until user space", "exits", _exits),
    _Figure("memory beyond the guest's", "B", lambda seen: seen.rss_beyond_guest_bytes),
)


def cases(options: Options) -> Iterator[Case]:
    """All figures, once every contender has had its turns; a first boot of each is not counted."""
    kit = Kit.find()
    seen: dict[str, list[Boot]] = {}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="avmm-bench."))
        disk = Path(folder) / "disk.img"
        with disk.open("wb") as file:
            file.truncate(_DISK_BYTES)
        stack.enter_context(ground.exit_counts())
        tap = stack.enter_context(ground.tap(TAP))
        machine = Machine(
            kit.kernel, kit.initrd, _CMDLINE, _CPUS, _MEMORY_MIB, (Disk(disk),), (tap,)
        )
        contenders = taking_part(CONTENDERS, options)
        for run in range(options.runs + 1):
            for contender in contenders:
                options.say(f"run {run} of {options.runs}: {contender.name}")
                done = again(lambda c=contender: boot(c, machine), options)  # type: ignore[misc]
                if done is not None and run > 0:
                    seen.setdefault(contender.name, []).append(done)
    for figure in _FIGURES:
        series = {
            name: values
            for name, boots in seen.items()
            if (values := [v for b in boots if (v := figure.get(b)) is not None])
        }
        if series:
            yield Case(SUITE, figure.name, figure.unit, figure.better, series, list(figure.aims))
