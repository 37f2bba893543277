"""A vCPU's descriptor: its state in and out. Running it is native/vcpu.c's."""

from __future__ import annotations

import os
from collections.abc import Mapping

from avmm.errors import HostError
from avmm.kvm import abi
from avmm.kvm.ioctl import ioctl


class Vcpu:
    """One KVM vCPU. Its ioctls wait while KVM_RUN runs, so call them when it is stopped."""

    def __init__(self, fd: int, index: int) -> None:
        self.fd = fd
        self.index = index

    def set_cpuid(self, table: bytearray) -> None:
        """KVM_SET_CPUID2 with a packed struct kvm_cpuid2."""
        ioctl(self.fd, "KVM_SET_CPUID2", abi.SET_CPUID2, table)

    def regs(self) -> dict[str, int]:
        """The general registers, rip and rflags, by name."""
        data = bytearray(abi.REGS.size)
        ioctl(self.fd, "KVM_GET_REGS", abi.GET_REGS, data)
        return dict(zip(abi.REGS_FIELDS, abi.REGS.unpack(data), strict=True))

    def set_regs(self, values: Mapping[str, int]) -> None:
        """Set every general register; those not named become 0 (rflags: 2)."""
        regs = {"rflags": 2, **values}
        data = abi.REGS.pack(*(regs.get(name, 0) for name in abi.REGS_FIELDS))
        ioctl(self.fd, "KVM_SET_REGS", abi.SET_REGS, data)

    def sregs(self) -> bytearray:
        """struct kvm_sregs."""
        data = bytearray(abi.SREGS_BYTES)
        ioctl(self.fd, "KVM_GET_SREGS", abi.GET_SREGS, data)
        return data

    def set_sregs(self, data: bytearray) -> None:
        """struct kvm_sregs."""
        ioctl(self.fd, "KVM_SET_SREGS", abi.SET_SREGS, data)

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """Write each MSR; HostError("msr") names the first that KVM does not take."""
        data = bytearray(abi.MSR_HEAD.pack(len(values), 0))
        for index, value in values.items():
            data += abi.MSR_ENTRY.pack(index, 0, value)
        written = ioctl(self.fd, "KVM_SET_MSRS", abi.SET_MSRS, data)
        if written != len(values):
            refused = list(values)[written]
            raise HostError("msr", op="KVM_SET_MSRS", remedy=f"MSR {refused:#x} was refused")

    def lapic(self) -> bytearray:
        """The local APIC's register page."""
        data = bytearray(abi.LAPIC_STATE_BYTES)
        ioctl(self.fd, "KVM_GET_LAPIC", abi.GET_LAPIC, data)
        return data

    def set_lapic(self, data: bytearray) -> None:
        """The local APIC's register page."""
        ioctl(self.fd, "KVM_SET_LAPIC", abi.SET_LAPIC, data)

    def mp_state(self) -> int:
        """KVM_MP_STATE_*: 0 runnable, 1 not started (waits for INIT and SIPI), 3 halted."""
        data = bytearray(abi.MP_STATE.size)
        ioctl(self.fd, "KVM_GET_MP_STATE", abi.GET_MP_STATE, data)
        return int(abi.MP_STATE.unpack(data)[0])

    def close(self) -> None:
        """Close; it must not be running. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
