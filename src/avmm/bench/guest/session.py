"""One boot of one contender, watched from outside: its console, its costs, its end."""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import subprocess
import time
from dataclasses import dataclass, field
from typing import Any

from avmm.bench.guest.contenders import Contender, Machine
from avmm.bench.guest.meter import Meter, Sample, virtual_machines
from avmm.errors import HostError

SILENCE_LIMIT_S = 40.0
"""A guest that says nothing for so long hangs: a boot takes seconds, and so does a row."""
BOOT_LIMIT_S = 240.0
"""One that goes on complaining, about a CPU of its own that is stuck, hangs as well."""

_USER_SPACE = re.compile(r"AVMM-GUEST: userspace ([\d.]+)")
_ROW = re.compile(r"AVMM-BENCH: (begin|end) (\S+)(?: (\d+))?")


@dataclass(frozen=True, slots=True)
class Boundary:
    """The moment a row ended, or the first began. row: "" for the latter. status: of the row's
    program. own: avmm's statistics at that moment, None for others."""

    row: str
    status: int
    sample: Sample
    own: dict[str, Any] | None = None


@dataclass(slots=True)
class Boot:
    """What was seen; seconds since the process began, None what did not happen.

    guest_uptime_s: the guest's own clock at user space. sample: at user space. statistics: what
    avmm said at its end.
    """

    first_byte_s: float | None = None
    kvm_run_s: float | None = None
    user_space_s: float | None = None
    guest_uptime_s: float | None = None
    rss_beyond_guest_bytes: int | None = None
    sample: Sample | None = None
    boundaries: list[Boundary] = field(default_factory=list)
    statistics: dict[str, Any] | None = None


def boot(contender: Contender, machine: Machine) -> Boot:
    """Run a guest to its poweroff. HostError("bench-guest") when it does not get there."""
    command = contender.command(machine)
    others = virtual_machines()
    began = time.monotonic()
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except OSError as e:
        raise HostError("bench-guest", op="Start of", path=command[0], errno=e.errno) from e
    with process:
        try:
            return _Watch(contender, machine, process, Meter(process.pid, others), began).run()
        finally:
            process.kill()


class _Watch:
    """Reads both streams of one process to their ends."""

    def __init__(
        self,
        contender: Contender,
        machine: Machine,
        process: subprocess.Popen[bytes],
        meter: Meter,
        began: float,
    ) -> None:
        self._contender = contender
        self._machine = machine
        self._process = process
        self._began = began
        self._meter = meter
        self._boot = Boot()
        self._text = ""
        self._lines = {"console": b"", "log": b""}
        self._own: list[dict[str, Any]] = []

    def run(self) -> Boot:
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdout, selectors.EVENT_READ, "console")
            selector.register(self._stderr, selectors.EVENT_READ, "log")
            while selector.get_map():
                ready = selector.select(timeout=SILENCE_LIMIT_S)
                now_s = time.monotonic() - self._began
                if not ready:
                    raise self._failed(f"no word for {SILENCE_LIMIT_S:.0f} s")
                if now_s > BOOT_LIMIT_S:
                    raise self._failed(f"not at its end after {BOOT_LIMIT_S:.0f} s")
                for key, _ in ready:
                    data = os.read(key.fd, 65536)
                    if not data:
                        selector.unregister(key.fileobj)
                    self._take(key.data, data, now_s)
        if self._boot.user_space_s is None:
            raise self._failed("it ended before user space")
        self._give_out_statistics()
        return self._boot

    @property
    def _stdout(self) -> int:
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    @property
    def _stderr(self) -> int:
        assert self._process.stderr is not None
        return self._process.stderr.fileno()

    def _failed(self, why: str) -> HostError:
        lines = "\n".join(self._text.splitlines()[-8:])
        return HostError(
            "bench-guest", op=f"{self._contender.name}: {why}; its last lines:\n{lines}\n"
        )

    def _take(self, stream: str, data: bytes, now_s: float) -> None:
        if stream == "console" and data and self._boot.first_byte_s is None:
            self._boot.first_byte_s = now_s
        *whole, self._lines[stream] = (self._lines[stream] + data).split(b"\n")
        for raw in whole:
            line = raw.decode(errors="replace").rstrip("\r")
            self._text += f"{line}\n"
            if stream == "console":
                self._on_console(line, now_s)
            else:
                self._on_log(line, now_s)

    def _on_console(self, line: str, now_s: float) -> None:
        if found := _USER_SPACE.search(line):
            self._boot.user_space_s = now_s
            self._boot.guest_uptime_s = float(found[1])
            self._boot.sample = self._meter.sample()
            memory_mib = self._machine.memory_mib
            self._boot.rss_beyond_guest_bytes = self._meter.rss_beyond_guest_bytes(memory_mib)
        elif found := _ROW.search(line):
            if found[1] == "end":
                self._mark(found[2], int(found[3]))
            elif not self._boot.boundaries:
                self._mark("", 0)

    def _on_log(self, line: str, now_s: float) -> None:
        if "microVM runs" in line and self._boot.kvm_run_s is None:
            self._boot.kvm_run_s = now_s
        elif line.startswith("{"):
            self._own.append(json.loads(line))

    def _mark(self, row: str, status: int) -> None:
        self._boot.boundaries.append(Boundary(row, status, self._meter.sample()))
        if self._contender.is_own:
            # Answered by a line on stderr, one for each boundary and one at the end.
            self._process.send_signal(signal.SIGUSR1)

    def _give_out_statistics(self) -> None:
        if not self._own:
            return
        self._boot.statistics = self._own[-1]
        if len(self._own) == len(self._boot.boundaries) + 1:
            self._boot.boundaries = [
                Boundary(b.row, b.status, b.sample, own)
                for b, own in zip(self._boot.boundaries, self._own, strict=False)
            ]
