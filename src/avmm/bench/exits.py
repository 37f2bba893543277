"""Suite exits: what an exit of a guest costs, by where it is answered.

A guest of ten instructions accesses one register of a virtio-mmio device over and over; its time
for many accesses, less its time for few, is that of the accesses. It runs on any KVM. The limit is
the exit that the C loop answers by itself: what KVM takes for its part is in all of them.
"""

from __future__ import annotations

import os
import struct
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

from avmm.bench.record import LIMIT, OWN, Aim, Case
from avmm.bench.suite import Options
from avmm.bench.tiny import elf
from avmm.errors import HostError
from avmm.loop import run as run_loop
from avmm.machine.config import Config
from avmm.machine.machine import MicroVM
from avmm.machine.reason import ExitKind
from avmm.mem.layout import PORT_ACPI, VIRTIO_MMIO
from avmm.virtio.transport import mmio

SUITE = "exits"

_FEW = 16
_FIRST_TRY = 2000
_MOST = 1 << 30
_NO_QUEUE = 0xFFFF


@dataclass(frozen=True, slots=True)
class Access:
    """One kind of exit: a register read, or written with `value`."""

    name: str
    register: int
    value: int | None = None
    aims: tuple[Aim, ...] = ()


_IN_C = Access("answered in C", mmio.INTERRUPT_STATUS)

ACCESSES = (
    _IN_C,
    Access("taken by KVM: ioeventfd", mmio.QUEUE_NOTIFY, 0, (Aim(LIMIT, 1.0),)),
    Access("answered in Python on the vCPU's thread", mmio.STATUS),
    Access("posted to the loop", mmio.QUEUE_NOTIFY, _NO_QUEUE),
    Access("called on the loop, which the guest waits for", mmio.STATUS, 0),
)


def cases(options: Options) -> Iterator[Case]:
    """See the suite protocol. Needs /dev/kvm."""
    limit: list[float] = []
    with tempfile.TemporaryDirectory(prefix="avmm-bench-") as folder:
        path = os.path.join(folder, "guest")
        for access in ACCESSES:
            runs = _measure(access, path, options)
            series = {OWN: runs} if access is _IN_C else {OWN: runs, LIMIT: limit}
            limit = limit or runs
            yield Case(SUITE, access.name, "s/exit", "lower", series, list(access.aims))


def _measure(access: Access, path: str, options: Options) -> list[float]:
    """Seconds of one exit, run by run; each run takes about options.seconds."""
    few_s = min(_seconds(access, path, _FEW) for _ in range(3))
    count = _FIRST_TRY
    while (taken_s := _seconds(access, path, count)) < options.seconds / 2 and count < _MOST:
        count *= 4 if taken_s < options.seconds / 8 else 2
    runs = [_seconds(access, path, count) for _ in range(options.runs)]
    return [max(0.0, run_s - few_s) / (count - _FEW) for run_s in runs]


def _seconds(access: Access, path: str, count: int) -> float:
    """The guest's life with so many accesses, without building the machine."""
    with open(path, "wb") as file:
        file.write(kernel(access, count))
    # Without a budget: a guest that does nothing else is made to wait.
    config = Config(
        kernel=path, memory="4M", cmdline="", rng=True, transport="mmio", exit_share=1.0
    )
    return run_loop(_live(config))


async def _live(config: Config) -> float:
    async with MicroVM(config) as vm:
        began = time.perf_counter()
        reason = await vm.wait()
        ended = time.perf_counter()
    if reason.kind is not ExitKind.POWEROFF:
        raise HostError("guest", op="Guest of the exits suite", remedy=str(reason))
    return ended - began


def kernel(access: Access, count: int) -> bytes:
    """An ELF kernel that does `count` accesses and powers the machine off."""
    read, write = b"\x8b\x43", b"\x89\x43"  # mov eax, [rbx + offset]; mov [rbx + offset], eax
    code = b"".join(
        (
            b"\xbb" + struct.pack("<I", VIRTIO_MMIO),  # mov ebx, the device's registers
            b"\xb9" + struct.pack("<I", count),  # mov ecx, count
            b"\xb8" + struct.pack("<I", access.value or 0),  # mov eax, value
            (read if access.value is None else write) + bytes([access.register]),
            b"\xff\xc9",  # dec ecx
            b"\x75\xf9",  # jnz, seven bytes back to the access
            b"\x66\xba" + struct.pack("<H", PORT_ACPI),  # mov dx, the sleep control register
            b"\xb0\x34",  # mov al, sleep enable and type 5
            b"\xee",  # out dx, al
            b"\xeb\xfe",  # jmp to itself
        )
    )
    return elf(code)
