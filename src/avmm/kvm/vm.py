"""A virtual machine's descriptor: memory slots, interrupt controller, event descriptors."""

from __future__ import annotations

import os

from avmm.kvm import abi
from avmm.kvm.ioctl import ioctl
from avmm.kvm.vcpu import Vcpu


class Vm:
    """One KVM VM. Any thread; usable only in the process that made it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def set_memory(self, slot: int, gpa: int, size_bytes: int, hva: int) -> None:
        """Map `size_bytes` at host address `hva` into the guest; 0 bytes removes the slot."""
        argument = abi.USERSPACE_MEMORY_REGION.pack(slot, 0, gpa, size_bytes, hva)
        ioctl(self.fd, "KVM_SET_USER_MEMORY_REGION", abi.SET_USER_MEMORY_REGION, argument)

    def create_irqchip(self) -> None:
        """PIC, IOAPIC and a local APIC for each vCPU made later, all in the kernel."""
        ioctl(self.fd, "KVM_CREATE_IRQCHIP", abi.CREATE_IRQCHIP)

    def create_pit(self) -> None:
        """The 8254 timer, with its speaker port answered in the kernel."""
        argument = abi.PIT_CONFIG.pack(abi.PIT_SPEAKER_DUMMY)
        ioctl(self.fd, "KVM_CREATE_PIT2", abi.CREATE_PIT2, argument)

    def set_tss(self, gpa: int) -> None:
        """Where KVM may keep three pages on processors without unrestricted guest mode."""
        ioctl(self.fd, "KVM_SET_TSS_ADDR", abi.SET_TSS_ADDR, gpa)

    def set_identity_map(self, gpa: int) -> None:
        """Where KVM may keep one more page, likewise; before any vCPU is made."""
        argument = gpa.to_bytes(8, "little")
        ioctl(self.fd, "KVM_SET_IDENTITY_MAP_ADDR", abi.SET_IDENTITY_MAP_ADDR, argument)

    def irqfd(self, event_fd: int, gsi: int) -> None:
        """Each write to `event_fd` becomes one edge on `gsi`."""
        ioctl(self.fd, "KVM_IRQFD", abi.IRQFD_ASSIGN, abi.IRQFD.pack(event_fd, gsi, 0, 0))

    def ioeventfd(self, event_fd: int, gpa: int, size_bytes: int, value: int) -> None:
        """A guest write of `value`, `size_bytes` wide, at `gpa` signals `event_fd`, no exit."""
        argument = abi.IOEVENTFD.pack(value, gpa, size_bytes, event_fd, abi.IOEVENTFD_DATAMATCH)
        ioctl(self.fd, "KVM_IOEVENTFD", abi.IOEVENTFD_ASSIGN, argument)

    def create_vcpu(self, index: int) -> Vcpu:
        """vCPU with APIC id `index`."""
        return Vcpu(ioctl(self.fd, "KVM_CREATE_VCPU", abi.CREATE_VCPU, index), index)

    def close(self) -> None:
        """Close; the kernel frees the VM when its vCPUs are closed too. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
