"""The boot benchmark behind scripts/bench: avmm, QEMU microvm and kvmtool take turns."""

from __future__ import annotations

import argparse
import json
import os
import re
import selectors
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

CACHE = Path(os.environ["AVMM_CACHE"])
AVMM = Path(sys.executable).with_name("avmm")
USERSPACE = re.compile(rb"AVMM-GUEST: userspace ([\d.]+)")
HOST = "172.31.78.1"
TIMEOUT_S = 120

ROWS = (
    ("kvm_run_s", "process start to KVM_RUN"),
    ("first_byte_s", "process start to first console byte"),
    ("user_space_s", "process start to user space"),
    ("guest_uptime_s", "guest's own clock at user space"),
    ("rss_beyond_guest_mib", "resident memory beyond the guest's"),
)


@dataclass
class Setup:
    """What all of them boot."""

    kernel: Path
    initrd: Path
    disk: Path
    cpus: int
    memory_mib: int
    kvmtool: str | None
    cmdline: str = "console=ttyS0 quiet avmm.cmd=dHJ1ZQ=="


@dataclass
class Series:
    """The runs of one VMM: for each row its values."""

    values: dict[str, list[float]] = field(default_factory=dict)
    stats: dict[str, object] = field(default_factory=dict)

    def add(self, row: str, value: float) -> None:
        self.values.setdefault(row, []).append(value)


def avmm_command(setup: Setup) -> list[str]:
    return [
        *(str(AVMM), "run", "--kernel", str(setup.kernel), "--initrd", str(setup.initrd)),
        *("--cmdline", setup.cmdline, "--cpus", str(setup.cpus)),
        *("--memory", f"{setup.memory_mib}M", "--disk", str(setup.disk)),
        *("--net", f"tap=avmmbench0,host={HOST}/24", "--rng", "--stats", "-v"),
    ]


def qemu_command(setup: Setup) -> list[str]:
    machine = "microvm,accel=kvm,acpi=on,pit=off,pic=off,rtc=off,isa-serial=on"
    return [
        *("qemu-system-x86_64", "-M", machine, "-cpu", "host", "-smp", str(setup.cpus)),
        *("-m", str(setup.memory_mib), "-nodefaults", "-no-user-config", "-display", "none"),
        *("-no-reboot", "-serial", "stdio", "-kernel", str(setup.kernel)),
        *("-initrd", str(setup.initrd), "-append", setup.cmdline),
        *("-drive", f"id=d0,file={setup.disk},format=raw,if=none,aio=io_uring"),
        *("-device", "virtio-blk-device,drive=d0"),
        *("-netdev", "tap,id=n0,ifname=qemubench0,script=no,downscript=no,vhost=off"),
        *("-device", "virtio-net-device,netdev=n0", "-device", "virtio-rng-device"),
    ]


def kvmtool_command(setup: Setup) -> list[str]:
    assert setup.kvmtool is not None
    return [
        *(setup.kvmtool, "run", "--kernel", str(setup.kernel), "--initrd", str(setup.initrd)),
        *("--params", setup.cmdline, "--cpus", str(setup.cpus), "--mem", str(setup.memory_mib)),
        *("--disk", str(setup.disk), "--network", "mode=none", "--console", "serial"),
    ]


def rss_beyond_guest_mib(pid: int, memory_mib: int) -> float:
    """Resident memory of all mappings but the guest's RAM, which is the one of that size."""
    total_kib = size_kib = 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if line.startswith("Size:"):
            size_kib = int(line.split()[1])
        elif line.startswith("Rss:"):
            ram = memory_mib * 1024 <= size_kib <= (memory_mib + 4) * 1024
            total_kib += 0 if ram else int(line.split()[1])
    return total_kib / 1024


def run_once(command: list[str], series: Series, memory_mib: int) -> None:
    """One boot to poweroff."""
    began = time.monotonic()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            watch(process, series, began, memory_mib)
        finally:
            process.kill()


def watch(process: subprocess.Popen[bytes], series: Series, began: float, memory_mib: int) -> None:
    assert process.stdout is not None
    assert process.stderr is not None
    text, errors, seen = b"", b"", set()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(process.stderr, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(timeout=TIMEOUT_S)
            now = time.monotonic() - began
            if not ready:
                raise SystemExit(f"no end after {TIMEOUT_S} s: {process.args}")
            for key, _ in ready:
                data = os.read(key.fd, 65536)
                if not data:
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stdout:
                    text += data
                    if "first" not in seen:
                        seen.add("first")
                        series.add("first_byte_s", now)
                else:
                    errors += data
                    if b"microVM runs" in errors and "run" not in seen:
                        seen.add("run")
                        series.add("kvm_run_s", now)
            match = USERSPACE.search(text)
            if match and "user" not in seen:
                seen.add("user")
                series.add("user_space_s", now)
                series.add("guest_uptime_s", float(match[1]))
                series.add("rss_beyond_guest_mib", rss_beyond_guest_mib(process.pid, memory_mib))
    if "user" not in seen:
        raise SystemExit(
            f"user space was not reached: {process.args}\n"
            f"{(text + errors).decode(errors='replace')}"
        )
    for line in errors.splitlines():
        if line.startswith(b"{"):
            series.stats = json.loads(line)


def seconds_of(*command: str, runs: int) -> float:
    """Median wall time of a command."""
    times = []
    for _ in range(runs):
        began = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.monotonic() - began)
    return statistics.median(times)


def report(all_series: dict[str, Series]) -> None:
    """Medians with their spread, and avmm's ratio to each peer."""
    own = all_series["avmm"]
    for row, text in ROWS:
        parts = []
        for name, series in all_series.items():
            values = series.values.get(row)
            if not values:
                continue
            median = statistics.median(values)
            part = f"{name} {median:.2f} ({min(values):.2f}-{max(values):.2f})"
            if series is not own and row in own.values:
                part += f", avmm is {statistics.median(own.values[row]) / median:.2f}x"
            parts.append(part)
        print(f"{text:40} {'; '.join(parts)}")
    for index, vcpu in enumerate(own.stats.get("vcpus", [])):  # type: ignore[arg-type,var-annotated]
        pairs = ", ".join(f"{k} {v}" for k, v in vcpu.items() if k != "python_ns")
        python = vcpu["pio"] + vcpu["mmio"] + vcpu["signals"]
        cost_us = vcpu["python_ns"] / 1e3 / python
        print(f"exits of vCPU {index}: {pairs}; in Python {cost_us:.0f} us each")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench boot")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--memory", type=int, default=512, metavar="MIB")
    parser.add_argument("--kernel", choices=["cloud", "generic", "rt"], default="cloud")
    parser.add_argument("--kvmtool", metavar="BINARY")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    peers: dict[str, Callable[[Setup], list[str]]] = {"avmm": avmm_command, "qemu": qemu_command}
    if options.kvmtool:
        peers["kvmtool"] = kvmtool_command
    busybox = str(CACHE / "busybox")
    with tempfile.TemporaryDirectory() as folder:
        disk = Path(folder) / "disk.img"
        with disk.open("wb") as file:
            file.truncate(64 << 20)
        setup = Setup(
            CACHE / f"kernels/{options.kernel}/vmlinuz",
            CACHE / f"guest/{options.kernel}/initrd.img",
            disk,
            options.cpus,
            options.memory,
            options.kvmtool,
        )
        all_series = {name: Series() for name in peers}
        subprocess.run([busybox, "tunctl", "-t", "qemubench0"], check=True, capture_output=True)
        try:
            for count in range(options.runs + 1):
                for name, command in peers.items():
                    series = all_series[name] if count else Series()  # the first is a warm-up
                    run_once(command(setup), series, options.memory)
        finally:
            subprocess.run([busybox, "tunctl", "-d", "qemubench0"], check=True, capture_output=True)
    report(all_series)
    imports = seconds_of(sys.executable, "-c", "import avmm", runs=options.runs)
    bare = seconds_of(sys.executable, "-c", "pass", runs=options.runs)
    help_s = seconds_of(str(AVMM), "--help", runs=options.runs)
    print(f"import avmm {(imports - bare) * 1000:.0f} ms, avmm --help {help_s * 1000:.0f} ms")
    if options.json:
        values = {
            name: series.values | {"stats": series.stats} for name, series in all_series.items()
        }
        Path(options.json).write_text(json.dumps(values, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
