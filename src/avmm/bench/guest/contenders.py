"""Who takes part: avmm in its configurations, and its peers, as command lines for one machine."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from avmm.bench.record import OWN

MAC = "52:54:00:00:4b:01"
CID = 78
"""The guest's address on vsock."""


@dataclass(frozen=True, slots=True)
class Disk:
    """One disk of the guest. direct: a benchmark's, past the host's page cache and with a thread
    of its own where a contender has threads."""

    path: Path
    direct: bool = False


@dataclass(frozen=True, slots=True)
class Machine:
    """What every contender boots. taps: names of TAPs that exist, are up and are free.
    vsock: the path of unix sockets that serve the guest's ports, where a contender has no AF_VSOCK
    on the host; None: no vsock."""

    kernel: Path
    initrd: Path
    cmdline: str
    cpus: int
    memory_mib: int
    disks: tuple[Disk, ...] = ()
    taps: tuple[str, ...] = ()
    vsock: Path | None = None


@dataclass(frozen=True, slots=True)
class Contender:
    """name: of its series. peer: the word of `--vs` that asks for it; None for avmm itself.
    missing: why it cannot take part on this host; None when it can."""

    name: str
    peer: str | None
    command: Callable[[Machine], list[str]]
    missing: Callable[[], str | None] = lambda: None

    @property
    def is_own(self) -> bool:
        """Whether it is avmm, which reports on itself."""
        return self.peer is None


# --- avmm ------------------------------------------------------------------------------------


def own(name: str, *options: str, net: str = "") -> Contender:
    """avmm with these options of `avmm run`; net: keys added to each --net."""

    def command(machine: Machine) -> list[str]:
        words = [sys.executable, "-m", "avmm", "run", *options, "--stats", "-v"]
        words += ["--kernel", str(machine.kernel), "--initrd", str(machine.initrd)]
        words += ["--cmdline", machine.cmdline, "--cpus", str(machine.cpus)]
        words += ["--memory", f"{machine.memory_mib}M"]
        for disk in machine.disks:
            words += ["--disk", f"{disk.path},direct" if disk.direct else str(disk.path)]
        for index, tap in enumerate(machine.taps):
            words += ["--net", f"tap={tap},mac={_mac(index)}{net}"]
        if machine.vsock is not None:
            words += ["--vsock", f"cid={CID},uds={machine.vsock}"]
        return words

    return Contender(name, None, command)


AVMM = own(OWN)
AVMM_THREAD = own("avmm io-threads=1", "--io-threads", "1")
AVMM_VHOST = own("avmm vhost=on", net=",vhost=on")


# --- QEMU ------------------------------------------------------------------------------------


def _qemu(name: str, peer: str, machine_type: str, bus: str, *, vhost: bool = False) -> Contender:
    def command(machine: Machine) -> list[str]:
        words = ["qemu-system-x86_64", "-M", machine_type, "-cpu", "host"]
        words += ["-smp", str(machine.cpus), "-m", str(machine.memory_mib)]
        words += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        words += ["-serial", "stdio", "-kernel", str(machine.kernel)]
        words += ["-initrd", str(machine.initrd), "-append", machine.cmdline]
        if bus == "device":
            words += ["-global", "virtio-mmio.force-legacy=false"]
        for index, disk in enumerate(machine.disks):
            words += _qemu_disk(index, disk, bus)
        for index, tap in enumerate(machine.taps):
            words += _qemu_nic(index, tap, bus, vhost)
        if machine.vsock is not None:
            words += ["-device", f"vhost-vsock-{bus},guest-cid={CID}"]
        return words

    return Contender(name, peer, command, lambda: _not_found("qemu-system-x86_64"))


def _qemu_disk(index: int, disk: Disk, bus: str) -> list[str]:
    drive = f"id=d{index},file={disk.path},format=raw,if=none"
    device = f"virtio-blk-{bus},drive=d{index}"
    if bus == "pci":
        device += ",disable-legacy=on"
    if not disk.direct:
        return ["-drive", drive, "-device", device]
    return [
        *("-object", f"iothread,id=io{index}"),
        *("-drive", f"{drive},cache=none,aio=io_uring"),
        *("-device", f"{device},iothread=io{index}"),
    ]


def _qemu_nic(index: int, tap: str, bus: str, vhost: bool) -> list[str]:
    device = f"virtio-net-{bus},netdev=n{index},mac={_mac(index)}"
    if bus == "pci":
        device += ",disable-legacy=on,romfile="
    netdev = f"tap,id=n{index},ifname={tap},script=no,downscript=no"
    return ["-netdev", f"{netdev},vhost={'on' if vhost else 'off'}", "-device", device]


_Q35 = "q35,accel=kvm"
_MICROVM = "microvm,accel=kvm,acpi=on,pit=off,pic=off,rtc=off,isa-serial=on"

QEMU = _qemu("qemu", "qemu", _Q35, "pci")
QEMU_MICROVM = _qemu("qemu-microvm", "qemu-microvm", _MICROVM, "device")
QEMU_VHOST = _qemu("qemu-vhost", "vhost", _Q35, "pci", vhost=True)


# --- kvmtool ---------------------------------------------------------------------------------


def _kvmtool(machine: Machine) -> list[str]:
    words = [_kvmtool_binary() or "lkvm", "run", "--console", "serial"]
    words += ["--kernel", str(machine.kernel), "--initrd", str(machine.initrd)]
    words += ["--params", machine.cmdline, "--cpus", str(machine.cpus)]
    words += ["--mem", str(machine.memory_mib)]
    for disk in machine.disks:
        words += ["--disk", f"{disk.path},direct" if disk.direct else str(disk.path)]
    for index, tap in enumerate(machine.taps):
        words += ["--network", f"mode=tap,tapif={tap},guest_mac={_mac(index)}"]
    return words if machine.taps else [*words, "--network", "mode=none"]


def _kvmtool_binary() -> str | None:
    return os.environ.get("AVMM_KVMTOOL") or shutil.which("lkvm") or shutil.which("kvmtool")


KVMTOOL = Contender(
    "kvmtool",
    "kvmtool",
    _kvmtool,
    lambda: None if _kvmtool_binary() else "no lkvm in PATH, and AVMM_KVMTOOL names none",
)


def _mac(index: int) -> str:
    return f"{MAC[:-1]}{int(MAC[-1]) + index}"


def _not_found(program: str) -> str | None:
    return None if shutil.which(program) else f"{program} is not installed"
