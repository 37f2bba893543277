"""The state in which each vCPU begins."""

from __future__ import annotations

from avmm.boot.entry import EntryRegs
from avmm.kvm.system import CpuidEntry, pack_cpuid
from avmm.kvm.vcpu import Vcpu
from avmm.machine.vcpu.cpuid import vcpu_cpuid

_MSR_IA32_MISC_ENABLE = 0x1A0
_MISC_ENABLE_FAST_STRINGS = 1
_MSR_MTRR_DEF_TYPE = 0x2FF
_MTRR_ENABLE_WRITE_BACK = 1 << 11 | 6

_LAPIC_LVT_LINT0 = 0x350
_LAPIC_LVT_LINT1 = 0x360
_DELIVERY_EXTINT = 7 << 8
_DELIVERY_NMI = 4 << 8


def set_up(
    vcpu: Vcpu,
    cpus: int,
    supported: list[CpuidEntry],
    entry: EntryRegs | None,
    *,
    tsc_deadline: bool,
) -> None:
    """Everything but the run itself. entry: the boot vCPU's registers; the others have None and
    wait for INIT and SIPI."""
    table = vcpu_cpuid(supported, vcpu.index, cpus, tsc_deadline=tsc_deadline)
    vcpu.set_cpuid(pack_cpuid(table))
    vcpu.set_msrs(
        {
            _MSR_IA32_MISC_ENABLE: _MISC_ENABLE_FAST_STRINGS,
            # What firmware leaves behind: all memory write-back. Kernels that trust the MTRRs
            # otherwise run uncached.
            _MSR_MTRR_DEF_TYPE: _MTRR_ENABLE_WRITE_BACK,
        }
    )
    if entry is None:
        return
    _wire_local_interrupts(vcpu)
    vcpu.set_sregs(entry.sregs(vcpu.sregs()))
    vcpu.set_regs(entry.general)


def _wire_local_interrupts(vcpu: Vcpu) -> None:
    """LINT0 takes the PIC's interrupts and LINT1 the NMI, as the MultiProcessor specification's
    virtual wire mode has it (3.6.2.2)."""
    lapic = vcpu.lapic()
    for register, delivery in (
        (_LAPIC_LVT_LINT0, _DELIVERY_EXTINT),
        (_LAPIC_LVT_LINT1, _DELIVERY_NMI),
    ):
        lapic[register : register + 4] = delivery.to_bytes(4, "little")
    vcpu.set_lapic(lapic)
