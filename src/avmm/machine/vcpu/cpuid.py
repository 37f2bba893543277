"""The CPUID table of each vCPU: what KVM supports, with one package of single-thread cores.

Leaf numbers and fields: Intel SDM volume 2A (CPUID), AMD APM volume 3 appendix E.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from avmm.kvm.system import CpuidEntry

_HYPERVISOR = 1 << 31
_TSC_DEADLINE = 1 << 24
_HTT = 1 << 28
_LEVEL_SMT = 1
_LEVEL_CORE = 2
_CACHE_TYPE_MASK = 0x1F


def vcpu_cpuid(
    supported: Iterable[CpuidEntry], apic_id: int, cpus: int, *, tsc_deadline: bool
) -> list[CpuidEntry]:
    """The table for vCPU `apic_id` of `cpus`, from KVM_GET_SUPPORTED_CPUID.

    tsc_deadline: whether the in-kernel APIC has that timer mode; KVM_GET_SUPPORTED_CPUID never
    says so, since it depends on the VM's interrupt controller.
    """
    entries = [e for e in supported if e.function not in (0xB, 0x1F)]
    table = [_adjusted(e, apic_id, cpus, tsc_deadline) for e in entries]
    table.extend(_topology(apic_id, cpus))
    return sorted(table, key=lambda e: (e.function, e.index))


def core_bits(cpus: int) -> int:
    """Bits of an APIC id that number the core inside the package."""
    return (cpus - 1).bit_length()


def _adjusted(e: CpuidEntry, apic_id: int, cpus: int, tsc_deadline: bool) -> CpuidEntry:
    match e.function:
        case 0x0:
            return replace(e, eax=max(e.eax, 0xB))
        case 0x1:
            ecx = e.ecx | _HYPERVISOR
            ecx = ecx | _TSC_DEADLINE if tsc_deadline else ecx & ~_TSC_DEADLINE
            edx = e.edx | _HTT if cpus > 1 else e.edx & ~_HTT
            ebx = (e.ebx & 0x0000FFFF) | (1 << core_bits(cpus)) << 16 | apic_id << 24
            return replace(e, ebx=ebx, ecx=ecx, edx=edx)
        case 0x4 if e.eax & _CACHE_TYPE_MASK:
            cores = (1 << core_bits(cpus)) - 1
            shared = cores if (e.eax >> 5) & 7 >= 3 else 0
            return replace(e, eax=(e.eax & 0x3FFF) | shared << 14 | cores << 26)
        case 0xA:
            # No performance counters: their state is not carried by a snapshot, and on some
            # hosts they are advertised but do not count.
            return replace(e, eax=0, ebx=0, ecx=0, edx=0)
        case 0x8000_0008:
            return replace(e, ecx=(e.ecx & ~0xF0FF) | core_bits(cpus) << 12 | (cpus - 1))
        case 0x8000_001D if e.eax & _CACHE_TYPE_MASK:
            shared = cpus - 1 if (e.eax >> 5) & 7 >= 3 else 0
            return replace(e, eax=(e.eax & ~(0xFFF << 14)) | shared << 14)
        case 0x8000_001E:
            return replace(e, eax=apic_id, ebx=apic_id, ecx=0)
    return e


def _topology(apic_id: int, cpus: int) -> Iterator[CpuidEntry]:
    """Leaf 0xB: one thread a core, `cpus` cores in the package, then the end of the list."""
    bits = core_bits(cpus)
    yield CpuidEntry(0xB, 0, True, 0, 1, _LEVEL_SMT << 8, apic_id)
    yield CpuidEntry(0xB, 1, True, bits, cpus, _LEVEL_CORE << 8 | 1, apic_id)
    yield CpuidEntry(0xB, 2, True, 0, 0, 2, apic_id)
