"""CPUID tables: topology leaves agree with each other on every vCPU."""

from __future__ import annotations

import pytest

from avmm.kvm.system import CpuidEntry
from avmm.machine.vcpu.cpuid import vcpu_cpuid

HOST = [
    CpuidEntry(0x0, 0, False, 0x7, 1, 2, 3),
    CpuidEntry(0x1, 0, False, 0xA10F11, 0x05020800, 0x81202000, 0x78BFBFF),
    CpuidEntry(0x4, 0, True, 0x1C004121, 0x1C0003F, 0x3F, 0),
    CpuidEntry(0x4, 3, True, 0x1C03C163, 0x3C0003F, 0x7FFF, 6),
    CpuidEntry(0x4, 4, True, 0, 0, 0, 0),
    CpuidEntry(0xA, 0, False, 0x7300402, 0, 0, 0x603),
    CpuidEntry(0xB, 0, True, 1, 2, 0x100, 77),
    CpuidEntry(0x80000008, 0, False, 0x3030, 0, 0x7001, 0),
    CpuidEntry(0x8000001D, 3, True, 0x4163, 0x3C0003F, 0x7FFF, 1),
    CpuidEntry(0x8000001E, 0, False, 9, 0x109, 5, 0),
]


def leaf(table: list[CpuidEntry], function: int, index: int = 0) -> CpuidEntry:
    [entry] = [e for e in table if (e.function, e.index) == (function, index)]
    return entry


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 8])
def test_every_leaf_names_the_same_apic_id(cpus: int) -> None:
    for apic_id in range(cpus):
        table = vcpu_cpuid(HOST, apic_id, cpus, tsc_deadline=True)
        assert leaf(table, 0x1).ebx >> 24 == apic_id
        assert leaf(table, 0xB, 0).edx == leaf(table, 0xB, 1).edx == apic_id
        assert leaf(table, 0x8000001E).eax == apic_id
        assert leaf(table, 0x8000001E).ebx & 0xFF == apic_id


@pytest.mark.parametrize(("cpus", "bits"), [(1, 0), (2, 1), (3, 2), (4, 2), (8, 3)])
def test_core_counts_agree_between_the_leaves(cpus: int, bits: int) -> None:
    table = vcpu_cpuid(HOST, 0, cpus, tsc_deadline=True)
    assert leaf(table, 0x1).ebx >> 16 & 0xFF == 1 << bits
    assert bool(leaf(table, 0x1).edx & 1 << 28) == (cpus > 1)
    assert leaf(table, 0x4, 3).eax >> 26 == (1 << bits) - 1
    assert leaf(table, 0xB, 1).eax == bits
    assert leaf(table, 0xB, 1).ebx == cpus
    assert leaf(table, 0x80000008).ecx & 0xFF == cpus - 1
    assert leaf(table, 0x80000008).ecx >> 12 & 0xF == bits


def test_the_last_level_cache_is_shared_and_the_first_is_not() -> None:
    table = vcpu_cpuid(HOST, 0, 4, tsc_deadline=True)
    assert leaf(table, 0x4, 0).eax >> 14 & 0xFFF == 0
    assert leaf(table, 0x4, 3).eax >> 14 & 0xFFF == 3
    assert leaf(table, 0x8000001D, 3).eax >> 14 & 0xFFF == 3
    assert leaf(table, 0x4, 4).eax == 0


def test_the_topology_leaf_is_reachable_and_its_list_ends() -> None:
    table = vcpu_cpuid(HOST, 0, 2, tsc_deadline=True)
    assert leaf(table, 0x0).eax >= 0xB
    assert leaf(table, 0xB, 2).ebx == 0
    assert [e for e in table if e.function == 0xB and e.edx == 77] == []


def test_the_guest_sees_a_hypervisor_and_no_performance_counters() -> None:
    table = vcpu_cpuid(HOST, 0, 1, tsc_deadline=False)
    assert leaf(table, 0x1).ecx >> 31 == 1
    assert leaf(table, 0xA).eax == 0


@pytest.mark.parametrize("has_it", [True, False])
def test_tsc_deadline_follows_the_capability(has_it: bool) -> None:
    table = vcpu_cpuid(HOST, 0, 1, tsc_deadline=has_it)
    assert bool(leaf(table, 0x1).ecx & 1 << 24) == has_it
