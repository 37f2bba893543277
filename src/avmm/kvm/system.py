"""/dev/kvm: what the host's KVM offers, and new virtual machines."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Self

from avmm.descriptors import Opener, open_path
from avmm.errors import HostError
from avmm.kvm import abi
from avmm.kvm.ioctl import ioctl
from avmm.kvm.vm import Vm

KVM_PATH = "/dev/kvm"

REQUIRED = (
    "irqchip",
    "user_memory",
    "set_tss_addr",
    "ext_cpuid",
    "mp_state",
    "irq_routing",
    "irqfd",
    "pit2",
    "ioeventfd",
    "set_identity_map_addr",
    "immediate_exit",
)
"""Capabilities without which avmm cannot run a guest, by their names in abi.CAP."""

_OPEN_REMEDIES = {
    errno.ENOENT: "load the kvm_intel or kvm_amd module, or enable virtualization in the firmware",
    errno.EACCES: "add your user to the group that owns it, usually kvm",
    errno.EPERM: "add your user to the group that owns it, usually kvm",
    errno.ENODEV: "the kvm module is loaded but no kvm_intel or kvm_amd is",
}


@dataclass(frozen=True, slots=True)
class CpuidEntry:
    """One row of the CPUID table; significant_index: whether `index` (ECX) selects it."""

    function: int
    index: int
    significant_index: bool
    eax: int
    ebx: int
    ecx: int
    edx: int


class Kvm:
    """The opened /dev/kvm. Any thread; no call blocks."""

    def __init__(self, fd: int, path: str) -> None:
        self.fd = fd
        self.path = path

    @classmethod
    def open(cls, path: str = KVM_PATH, opener: Opener = open_path) -> Self:
        """Open and check the API version. Raises HostError("kvm-open" | "kvm-version")."""
        try:
            fd = opener(path, os.O_RDWR)
        except OSError as e:
            remedy = _OPEN_REMEDIES.get(e.errno or 0)
            raise HostError("kvm-open", op="open", path=path, errno=e.errno, remedy=remedy) from e
        kvm = cls(fd, path)
        try:
            version = ioctl(fd, "KVM_GET_API_VERSION", abi.GET_API_VERSION)
            if version != abi.API_VERSION:
                raise HostError(
                    "kvm-version",
                    op=path,
                    remedy=f"its API version is {version}, and {abi.API_VERSION} is needed",
                )
        except BaseException:
            kvm.close()
            raise
        return kvm

    def extension(self, name: str) -> int:
        """KVM_CHECK_EXTENSION of a capability named in abi.CAP; 0 when absent."""
        return ioctl(self.fd, "KVM_CHECK_EXTENSION", abi.CHECK_EXTENSION, abi.CAP[name])

    def missing_capabilities(self) -> list[str]:
        """The names in REQUIRED that this KVM does not have."""
        return [name for name in REQUIRED if not self.extension(name)]

    def require_capabilities(self) -> None:
        """Raises HostError("kvm-capability") that names every missing capability."""
        if missing := self.missing_capabilities():
            names = ", ".join(f"KVM_CAP_{name.upper()}" for name in missing)
            raise HostError(
                "kvm-capability", op=self.path, remedy=f"it lacks {names}: use a newer kernel"
            )

    def run_bytes(self) -> int:
        """Size of a vCPU's shared kvm_run area."""
        return ioctl(self.fd, "KVM_GET_VCPU_MMAP_SIZE", abi.GET_VCPU_MMAP_SIZE)

    def supported_cpuid(self) -> list[CpuidEntry]:
        """KVM_GET_SUPPORTED_CPUID: the most that KVM can give a guest on this host."""
        rows = 256  # of which hosts have some 80 to 130: asking twice costs as much as twice
        while True:
            head, row = abi.CPUID_HEAD, abi.CPUID_ENTRY
            table = bytearray(head.size + rows * row.size)
            head.pack_into(table, 0, rows, 0)
            try:
                ioctl(self.fd, "KVM_GET_SUPPORTED_CPUID", abi.GET_SUPPORTED_CPUID, table)
            except HostError as e:
                if e.errno != errno.E2BIG or rows >= 4096:
                    raise
                rows *= 2
                continue
            count, _ = head.unpack_from(table)
            return [
                _cpuid_entry(row.unpack_from(table, head.size + i * row.size)) for i in range(count)
            ]

    def create_vm(self) -> Vm:
        """A new, empty virtual machine. KVM_CREATE_VM may be interrupted and is then retried."""
        while True:
            try:
                return Vm(ioctl(self.fd, "KVM_CREATE_VM", abi.CREATE_VM, 0))
            except HostError as e:
                if e.errno != errno.EINTR:
                    raise

    def close(self) -> None:
        """Close; VMs made from it live on. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _cpuid_entry(fields: tuple[int, ...]) -> CpuidEntry:
    function, index, flags, eax, ebx, ecx, edx = fields
    significant = bool(flags & abi.CPUID_SIGNIFICANT_INDEX)
    return CpuidEntry(function, index, significant, eax, ebx, ecx, edx)


def pack_cpuid(entries: list[CpuidEntry]) -> bytearray:
    """struct kvm_cpuid2 for KVM_SET_CPUID2."""
    table = bytearray(abi.CPUID_HEAD.pack(len(entries), 0))
    for e in entries:
        flags = abi.CPUID_SIGNIFICANT_INDEX if e.significant_index else 0
        table += abi.CPUID_ENTRY.pack(e.function, e.index, flags, e.eax, e.ebx, e.ecx, e.edx)
    return table
