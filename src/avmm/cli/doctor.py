"""avmm doctor: what of avmm this host can run, and what to do about the rest."""

from __future__ import annotations

import argparse
import ctypes
import enum
import errno
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from avmm.errors import HostError
from avmm.hostnet.tap import TUN_PATH
from avmm.kvm.system import Kvm

_CAP_NET_ADMIN = 12
_SYS_IO_URING_SETUP = 425
_VHOST_NET = "/dev/vhost-net"


class Verdict(enum.StrEnum):
    """WARN: `run` works, but not all of its options. FAIL: it does not work."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report. remedy: empty when there is nothing to do."""

    name: str
    verdict: Verdict
    found: str
    remedy: str = ""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `avmm doctor`."""
    parser.epilog = "Exit status: 0 when `avmm run` can work here, 1 when it cannot."
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Print the report; 0 when nothing failed."""
    checks = examine()
    if options.json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        print(format_report(checks))
    return 1 if any(check.verdict is Verdict.FAIL for check in checks) else 0


def examine() -> list[Check]:
    """All checks, most needed first."""
    return [
        *check_kvm(),
        check_hardware(Path("/proc/cpuinfo").read_text()),
        check_tun(),
        check_net_admin(Path("/proc/self/status").read_text()),
        check_io_uring(),
        check_hugepages(Path("/proc/meminfo").read_text()),
        check_vhost_net(),
    ]


def format_report(checks: list[Check]) -> str:
    """One aligned line a check, its remedy below it."""
    width = max(len(check.name) for check in checks)
    lines: list[str] = []
    for check in checks:
        lines.append(f"{check.verdict:4}  {check.name:{width}}  {check.found}")
        if check.remedy:
            lines.append(f"      {'':{width}}  -> {check.remedy}")
    return "\n".join(lines)


def check_kvm(path: str = "/dev/kvm") -> list[Check]:
    """The device, its API version, and the capabilities that avmm needs."""
    try:
        kvm = Kvm.open(path)
    except HostError as e:
        return [Check("kvm", Verdict.FAIL, str(e).split(" (")[0], e.remedy or "")]
    try:
        missing = kvm.missing_capabilities()
        cpus = kvm.extension("max_vcpus")
    finally:
        kvm.close()
    found = Check("kvm", Verdict.OK, f"{path}, API version 12, up to {cpus} vCPUs")
    if missing:
        names = ", ".join(f"KVM_CAP_{name.upper()}" for name in missing)
        return [
            found,
            Check("capabilities", Verdict.FAIL, f"missing: {names}", "use a newer kernel"),
        ]
    return [found, Check("capabilities", Verdict.OK, "all that avmm needs")]


def hardware_virtualization(cpuinfo: str) -> str | None:
    """ "vmx" or "svm" from /proc/cpuinfo; None when the processor shows neither."""
    for line in cpuinfo.splitlines():
        if line.startswith("flags"):
            flags = line.split()
            return next((flag for flag in ("vmx", "svm") if flag in flags), None)
    return None


def check_hardware(cpuinfo: str) -> Check:
    """Whether KVM runs guests on the processor, or interprets them in software."""
    flag = hardware_virtualization(cpuinfo)
    if flag:
        return Check("processor", Verdict.OK, f"hardware virtualization ({flag})")
    return Check(
        "processor",
        Verdict.WARN,
        "no vmx or svm flag: if KVM works here it is a software one, too slow and too "
        "incomplete for a stock Linux kernel",
        "enable VT-x or AMD-V in the firmware, or nested virtualization in the host of this VM",
    )


def check_tun(path: str = TUN_PATH) -> Check:
    """Whether TAPs can be attached."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as e:
        remedy = "modprobe tun" if e.errno in (errno.ENOENT, errno.ENODEV) else f"chmod a+rw {path}"
        return Check("tun", Verdict.WARN, f"{path}: {os.strerror(e.errno or 0)}; no --net", remedy)
    return Check("tun", Verdict.OK, path)


def check_net_admin(status: str) -> Check:
    """Whether TAPs can be made and addressed. status: of /proc/self/status."""
    capabilities = next(
        (int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:")), 0
    )
    if capabilities >> _CAP_NET_ADMIN & 1:
        return Check("net admin", Verdict.OK, "CAP_NET_ADMIN")
    return Check(
        "net admin",
        Verdict.WARN,
        "no CAP_NET_ADMIN: --net works only with a TAP made for your user",
        "run as root, or: ip tuntap add avmm0 mode tap user $USER vnet_hdr",
    )


def check_io_uring() -> Check:
    """Whether disks get io_uring, by setting one up."""
    libc = ctypes.CDLL(None, use_errno=True)
    parameters = ctypes.create_string_buffer(120)  # struct io_uring_params
    fd = libc.syscall(_SYS_IO_URING_SETUP, 4, parameters)
    if fd >= 0:
        os.close(fd)
        return Check("io_uring", Verdict.OK, "works")
    return Check(
        "io_uring",
        Verdict.WARN,
        f"{os.strerror(ctypes.get_errno())}: disks use threads instead",
        "sysctl kernel.io_uring_disabled=0, or allow it in the container's seccomp profile",
    )


def check_hugepages(meminfo: str) -> Check:
    """Whether --hugepages can work. meminfo: of /proc/meminfo."""
    values = dict(line.split(":", 1) for line in meminfo.splitlines() if ":" in line)
    free = int(values.get("HugePages_Free", "0").split()[0])
    if free:
        return Check("huge pages", Verdict.OK, f"{free} free")
    return Check(
        "huge pages", Verdict.WARN, "none free: no --hugepages", "sysctl vm.nr_hugepages=512"
    )


def check_vhost_net(path: str = _VHOST_NET) -> Check:
    """Whether the kernel could move packets by itself."""
    if os.access(path, os.R_OK | os.W_OK):
        return Check("vhost-net", Verdict.OK, path)
    return Check("vhost-net", Verdict.WARN, f"{path} is not usable", "modprobe vhost_net")
