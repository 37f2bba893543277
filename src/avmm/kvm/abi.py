"""The KVM API in numbers and layouts: <linux/kvm.h> and <asm/kvm.h> for x86-64."""

from __future__ import annotations

import struct
from typing import Final

_KVMIO = 0xAE


def _io(number: int) -> int:
    return (_KVMIO << 8) | number


def _iow(number: int, size_bytes: int) -> int:
    return (1 << 30) | (size_bytes << 16) | _io(number)


def _ior(number: int, size_bytes: int) -> int:
    return (2 << 30) | (size_bytes << 16) | _io(number)


def _iowr(number: int, size_bytes: int) -> int:
    return (3 << 30) | (size_bytes << 16) | _io(number)


API_VERSION: Final = 12

# Layouts. Trailing padding is part of each, since its size is part of the ioctl's number.
USERSPACE_MEMORY_REGION: Final = struct.Struct("=IIQQQ")
IRQFD: Final = struct.Struct("=IIII16x")
IOEVENTFD: Final = struct.Struct("=QQIiI36x")
IRQ_ROUTING_HEAD: Final = struct.Struct("=II")
IRQ_ROUTING_PIN: Final = struct.Struct("=IIIIII24x")
IRQ_ROUTING_MSI: Final = struct.Struct("=IIIIIIII16x")
IRQ_LEVEL: Final = struct.Struct("=II")
PIT_CONFIG: Final = struct.Struct("=I60x")
CPUID_HEAD: Final = struct.Struct("=II")
CPUID_ENTRY: Final = struct.Struct("=IIIIIII12x")
MSR_HEAD: Final = struct.Struct("=II")
MSR_ENTRY: Final = struct.Struct("=IIQ")
MSR_LIST_HEAD: Final = struct.Struct("=I")
REGS: Final = struct.Struct("=18Q")
SEGMENT: Final = struct.Struct("=QIHBBBBBBBBBB")
DESCRIPTOR_TABLE: Final = struct.Struct("=QH6x")
CONTROL: Final = struct.Struct("=QQQQQQQ")
INTERRUPT_BITMAP_BYTES: Final = 32
SREGS_BYTES: Final = 8 * SEGMENT.size + 2 * DESCRIPTOR_TABLE.size + 7 * 8 + INTERRUPT_BITMAP_BYTES
MP_STATE: Final = struct.Struct("=I")
LAPIC_STATE_BYTES: Final = 0x400
CLOCK_DATA: Final = struct.Struct("=QIIQQ16x")

REGS_FIELDS: Final = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags"),
)

# System ioctls.
GET_API_VERSION: Final = _io(0x00)
CREATE_VM: Final = _io(0x01)
GET_MSR_INDEX_LIST: Final = _iowr(0x02, MSR_LIST_HEAD.size)
CHECK_EXTENSION: Final = _io(0x03)
GET_VCPU_MMAP_SIZE: Final = _io(0x04)
GET_SUPPORTED_CPUID: Final = _iowr(0x05, CPUID_HEAD.size)

# VM ioctls.
CREATE_VCPU: Final = _io(0x41)
SET_USER_MEMORY_REGION: Final = _iow(0x46, USERSPACE_MEMORY_REGION.size)
SET_TSS_ADDR: Final = _io(0x47)
SET_IDENTITY_MAP_ADDR: Final = _iow(0x48, 8)
CREATE_IRQCHIP: Final = _io(0x60)
IRQ_LINE: Final = _iow(0x61, IRQ_LEVEL.size)
SET_GSI_ROUTING: Final = _iow(0x6A, IRQ_ROUTING_HEAD.size)
IRQFD_ASSIGN: Final = _iow(0x76, IRQFD.size)
CREATE_PIT2: Final = _iow(0x77, PIT_CONFIG.size)
IOEVENTFD_ASSIGN: Final = _iow(0x79, IOEVENTFD.size)
SET_CLOCK: Final = _iow(0x7B, CLOCK_DATA.size)
GET_CLOCK: Final = _ior(0x7C, CLOCK_DATA.size)

# vCPU ioctls.
GET_REGS: Final = _ior(0x81, REGS.size)
SET_REGS: Final = _iow(0x82, REGS.size)
GET_SREGS: Final = _ior(0x83, SREGS_BYTES)
SET_SREGS: Final = _iow(0x84, SREGS_BYTES)
GET_MSRS: Final = _iowr(0x88, MSR_HEAD.size)
SET_MSRS: Final = _iow(0x89, MSR_HEAD.size)
GET_LAPIC: Final = _ior(0x8E, LAPIC_STATE_BYTES)
SET_LAPIC: Final = _iow(0x8F, LAPIC_STATE_BYTES)
SET_CPUID2: Final = _iow(0x90, CPUID_HEAD.size)
GET_MP_STATE: Final = _ior(0x98, MP_STATE.size)
SET_MP_STATE: Final = _iow(0x99, MP_STATE.size)
KVMCLOCK_CTRL: Final = _io(0xAD)

# Flags.
IRQFD_DEASSIGN: Final = 1 << 0
IOEVENTFD_DATAMATCH: Final = 1 << 0
IOEVENTFD_PIO: Final = 1 << 1
IOEVENTFD_DEASSIGN: Final = 1 << 2
IRQ_ROUTING_IRQCHIP: Final = 1
IRQ_ROUTING_MSI_TYPE: Final = 2
IRQCHIP_PIC_MASTER: Final = 0
IRQCHIP_PIC_SLAVE: Final = 1
IRQCHIP_IOAPIC: Final = 2
PIT_SPEAKER_DUMMY: Final = 1
CPUID_SIGNIFICANT_INDEX: Final = 1 << 0

# Capabilities, by the number KVM_CHECK_EXTENSION takes.
CAP: Final = {
    "irqchip": 0,
    "user_memory": 3,
    "set_tss_addr": 4,
    "ext_cpuid": 7,
    "nr_vcpus": 9,
    "nr_memslots": 10,
    "mp_state": 14,
    "irq_routing": 25,
    "destroy_memory_region_works": 21,
    "irqfd": 32,
    "pit2": 33,
    "ioeventfd": 36,
    "set_identity_map_addr": 37,
    "adjust_clock": 39,
    "max_vcpus": 66,
    "tsc_deadline_timer": 72,
    "kvmclock_ctrl": 76,
    "ioeventfd_any_length": 122,
    "immediate_exit": 136,
}
