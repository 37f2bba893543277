"""How a boot vCPU begins: registers and segments as data, tables in guest memory.

Modes: Intel SDM volume 3A chapter 9 (mode switching); descriptors 3.4.5; paging 4.5.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from avmm.kvm import abi
from avmm.mem import layout
from avmm.mem.guest import GuestMemory

_CR0_PE = 1 << 0
_CR0_ET = 1 << 4
_CR0_PG = 1 << 31
_CR4_PAE = 1 << 5
_EFER_LME = 1 << 8
_EFER_LMA = 1 << 10

_PTE_PRESENT_WRITABLE = 0b11
_PTE_LARGE = 1 << 7

_CODE = 0b1011  # execute, read, accessed
_DATA = 0b0011  # read, write, accessed
_TSS_BUSY = 0b1011

SELECTOR_CODE = 0x10
SELECTOR_DATA = 0x18
SELECTOR_TSS = 0x20


@dataclass(frozen=True, slots=True)
class Segment:
    """struct kvm_segment; limit in bytes, fields as in a descriptor."""

    base: int = 0
    limit: int = 0xFFFF_FFFF
    selector: int = 0
    type: int = _DATA
    present: int = 1
    dpl: int = 0
    db: int = 1
    s: int = 1
    l: int = 0  # noqa: E741 - the manual's name
    g: int = 1
    avl: int = 0
    unusable: int = 0

    def pack(self) -> bytes:
        """As KVM takes it."""
        return abi.SEGMENT.pack(
            *(self.base, self.limit, self.selector, self.type, self.present, self.dpl),
            *(self.db, self.s, self.l, self.g, self.avl, self.unusable, 0),
        )

    def descriptor(self) -> int:
        """As a GDT holds it (SDM 3A figure 3-8)."""
        limit = self.limit >> 12 if self.g else self.limit
        access = self.type | self.s << 4 | self.dpl << 5 | self.present << 7
        flags = self.avl | self.l << 1 | self.db << 2 | self.g << 3
        return (
            (limit & 0xFFFF)
            | (self.base & 0xFF_FFFF) << 16
            | access << 40
            | (limit >> 16 & 0xF) << 48
            | flags << 52
            | (self.base >> 24 & 0xFF) << 56
        )


@dataclass(frozen=True, slots=True)
class EntryRegs:
    """The boot vCPU's state. general: by name, the others are 0 (rflags 2)."""

    general: Mapping[str, int]
    code: Segment
    data: Segment
    task: Segment
    cr0: int
    cr3: int = 0
    cr4: int = 0
    efer: int = 0
    gdt: tuple[int, int] = (0, 0)
    idt: tuple[int, int] = field(default=(0, 0xFFFF))

    def sregs(self, current: bytearray) -> bytearray:
        """struct kvm_sregs: `current` (its APIC base, LDT and pending interrupts) with this
        state."""
        head = self.code.pack() + self.data.pack() * 5 + self.task.pack()
        ldt = bytes(current[7 * abi.SEGMENT.size : 8 * abi.SEGMENT.size])
        tables = abi.DESCRIPTOR_TABLE.pack(*self.gdt) + abi.DESCRIPTOR_TABLE.pack(*self.idt)
        control_at = len(head) + len(ldt) + len(tables)
        _, cr2, _, _, cr8, _, apic_base = abi.CONTROL.unpack_from(current, control_at)
        control = abi.CONTROL.pack(self.cr0, cr2, self.cr3, self.cr4, cr8, self.efer, apic_base)
        rest = bytes(current[control_at + abi.CONTROL.size :])
        return bytearray(head + ldt + tables + control + rest)


def real_mode(cs_base: int, ip: int = 0) -> EntryRegs:
    """16-bit code at `cs_base` + `ip`, below 1 MiB; all segments begin at `cs_base`."""
    common = {"base": cs_base, "limit": 0xFFFF, "selector": cs_base >> 4, "db": 0, "g": 0}
    return EntryRegs(
        general={"rip": ip},
        code=Segment(type=_CODE, **common),
        data=Segment(type=_DATA, **common),
        task=Segment(limit=0xFFFF, type=_TSS_BUSY, s=0, db=0, g=0),
        cr0=_CR0_ET,
    )


def protected32(memory: GuestMemory, rip: int, general: Mapping[str, int]) -> EntryRegs:
    """Flat 32-bit code without paging, interrupts off; writes the GDT to guest memory."""
    return _flat(
        memory,
        code=Segment(selector=SELECTOR_CODE, type=_CODE),
        general={"rip": rip, **general},
        cr0=_CR0_PE | _CR0_ET,
        control={},
    )


def long64(memory: GuestMemory, rip: int, general: Mapping[str, int]) -> EntryRegs:
    """Flat 64-bit code with the first 4 GiB mapped one to one by 2 MiB pages, interrupts off;
    writes the GDT and the page tables to guest memory."""
    _write_page_tables(memory)
    return _flat(
        memory,
        code=Segment(selector=SELECTOR_CODE, type=_CODE, db=0, l=1),
        general={"rip": rip, "rsp": layout.BOOT_STACK_TOP, **general},
        cr0=_CR0_PE | _CR0_ET | _CR0_PG,
        control={"cr3": layout.PAGE_TABLES, "cr4": _CR4_PAE, "efer": _EFER_LME | _EFER_LMA},
    )


def _flat(
    memory: GuestMemory,
    code: Segment,
    general: Mapping[str, int],
    cr0: int,
    control: Mapping[str, int],
) -> EntryRegs:
    data = Segment(selector=SELECTOR_DATA)
    task = Segment(limit=0x67, selector=SELECTOR_TSS, type=_TSS_BUSY, s=0, db=0, g=0)
    gdt = struct.pack("<5Q", 0, 0, code.descriptor(), data.descriptor(), task.descriptor())
    memory.write(layout.GDT, gdt)
    return EntryRegs(
        general=general,
        code=code,
        data=data,
        task=task,
        cr0=cr0,
        gdt=(layout.GDT, len(gdt) - 1),
        idt=(0, 0),
        **control,
    )


def _write_page_tables(memory: GuestMemory) -> None:
    page = 4096
    pml4, pdpt, directories = (layout.PAGE_TABLES + page * i for i in range(3))
    memory.write(pml4, struct.pack("<Q", pdpt | _PTE_PRESENT_WRITABLE))
    memory.write(
        pdpt,
        struct.pack("<4Q", *(directories + page * i | _PTE_PRESENT_WRITABLE for i in range(4))),
    )
    large = _PTE_PRESENT_WRITABLE | _PTE_LARGE
    memory.write(directories, struct.pack("<2048Q", *(i << 21 | large for i in range(2048))))
