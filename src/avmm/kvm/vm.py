"""A virtual machine's descriptor: memory slots, interrupt controller, event descriptors."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from avmm.kvm import abi
from avmm.kvm.ioctl import ioctl
from avmm.kvm.vcpu import Vcpu


class Vm:
    """One KVM VM. Any thread; usable only in the process that made it.

    blocked_ns: how long its loop's changes of interrupts took, all together: KVM waits for those
    who look at its tables.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.blocked_ns = 0

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
        self._change("KVM_IRQFD", abi.IRQFD_ASSIGN, abi.IRQFD.pack(event_fd, gsi, 0, 0))

    def remove_irqfd(self, event_fd: int, gsi: int) -> None:
        """Undo irqfd(): what is written to `event_fd` from now on stays in it."""
        argument = abi.IRQFD.pack(event_fd, gsi, abi.IRQFD_DEASSIGN, 0)
        self._change("KVM_IRQFD", abi.IRQFD_ASSIGN, argument)

    def set_gsi_routing(self, entries: Sequence[bytes]) -> None:
        """KVM_SET_GSI_ROUTING: the whole table, of packed struct kvm_irq_routing_entry."""
        table = bytearray(abi.IRQ_ROUTING_HEAD.pack(len(entries), 0) + b"".join(entries))
        self._change("KVM_SET_GSI_ROUTING", abi.SET_GSI_ROUTING, table)

    def ioeventfd(self, event_fd: int, gpa: int, size_bytes: int, value: int | None) -> None:
        """A guest write at `gpa`, `size_bytes` wide, signals `event_fd` without an exit.

        value: what has to be written, None for anything. size_bytes: 0 for any width, where KVM
        has ioeventfd_any_length. It takes up to milliseconds while vCPUs run.
        """
        self._ioeventfd(event_fd, gpa, size_bytes, value, 0)

    def remove_ioeventfd(self, event_fd: int, gpa: int, size_bytes: int, value: int | None) -> None:
        """Undo ioeventfd() with the same arguments."""
        self._ioeventfd(event_fd, gpa, size_bytes, value, abi.IOEVENTFD_DEASSIGN)

    def _ioeventfd(
        self, event_fd: int, gpa: int, size_bytes: int, value: int | None, flags: int
    ) -> None:
        if value is not None:
            flags |= abi.IOEVENTFD_DATAMATCH
        argument = abi.IOEVENTFD.pack(value or 0, gpa, size_bytes, event_fd, flags)
        ioctl(self.fd, "KVM_IOEVENTFD", abi.IOEVENTFD_ASSIGN, argument)

    def _change(self, op: str, request: int, argument: bytes | bytearray) -> None:
        began = time.monotonic_ns()
        try:
            ioctl(self.fd, op, request, argument)
        finally:
            self.blocked_ns += time.monotonic_ns() - began

    def create_vcpu(self, index: int) -> Vcpu:
        """vCPU with APIC id `index`."""
        return Vcpu(ioctl(self.fd, "KVM_CREATE_VCPU", abi.CREATE_VCPU, index), index)

    def close(self) -> None:
        """Close; the kernel frees the VM when its vCPUs are closed too. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
