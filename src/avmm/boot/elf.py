"""ELF64 kernels: checking, loading, and the PVH entry note."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from avmm.errors import ConfigError
from avmm.mem.guest import GuestMemory
from avmm.units import Gpa

MAGIC = b"\x7fELF"
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_NOTE = struct.Struct("<III")
_MACHINE_X86_64 = 62
_MACHINES = {3: "32-bit x86", 40: "32-bit ARM", 183: "AArch64", 243: "RISC-V"}
_PT_LOAD = 1
_PT_NOTE = 4
_XEN_ELFNOTE_PHYS32_ENTRY = 18
_NOTES_MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class LoadSegment:
    """A PT_LOAD segment: `file_bytes` from `offset` go to `gpa`, the rest up to `size_bytes` is
    zero."""

    offset: int
    gpa: Gpa
    file_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ElfKernel:
    """What loading needs to know of a kernel. pvh_entry: None without a PVH note."""

    segments: tuple[LoadSegment, ...]
    entry: Gpa
    pvh_entry: Gpa | None

    @property
    def start(self) -> int:
        """Lowest guest physical address that is loaded."""
        return min(s.gpa for s in self.segments)

    @property
    def end(self) -> int:
        """First guest physical address behind the kernel, its zeroed part included."""
        return max(s.gpa + s.size_bytes for s in self.segments)


def parse(image: memoryview, name: str) -> ElfKernel:
    """Check an ELF64 x86-64 executable. name: for the ConfigError("kernel") of a bad one."""
    if len(image) < _HEADER.size:
        raise ConfigError("kernel", f"Kernel {name}: the ELF header is cut off")
    header = _HEADER.unpack_from(image)
    ident, machine, entry, table, entry_bytes, count = (
        *(header[0], header[2], header[4], header[5], header[9], header[10]),
    )
    if ident[4] != 2 or ident[5] != 1 or machine != _MACHINE_X86_64:
        what = _MACHINES.get(machine, f"ELF machine {machine}")
        raise ConfigError("kernel", f"Kernel {name} is for {what}; an x86-64 ELF is needed")
    if entry_bytes != _SEGMENT.size or table + count * _SEGMENT.size > len(image):
        raise ConfigError("kernel", f"Kernel {name}: the program header table is cut off")
    loads: list[LoadSegment] = []
    pvh_entry = None
    for index in range(count):
        fields = _SEGMENT.unpack_from(image, table + index * _SEGMENT.size)
        kind, offset, paddr, file_bytes, size_bytes = (
            *(fields[0], fields[2], fields[4], fields[5], fields[6]),
        )
        if kind not in (_PT_LOAD, _PT_NOTE):
            continue
        if offset + file_bytes > len(image) or file_bytes > size_bytes:
            raise ConfigError("kernel", f"Kernel {name}: segment {index} is cut off or damaged")
        if kind == _PT_LOAD and size_bytes:
            loads.append(LoadSegment(offset, Gpa(paddr), file_bytes, size_bytes))
        elif kind == _PT_NOTE:
            pvh_entry = _pvh_entry(image[offset : offset + file_bytes]) or pvh_entry
    if not loads:
        raise ConfigError("kernel", f"Kernel {name}: no segment is to be loaded; is it an object?")
    return ElfKernel(tuple(loads), Gpa(_physical(entry, loads, image, table, count)), pvh_entry)


def load(memory: GuestMemory, image: memoryview, kernel: ElfKernel) -> None:
    """Copy the segments; guest memory is fresh, so what the file does not cover is zero."""
    for s in kernel.segments:
        memory.write(s.gpa, image[s.offset : s.offset + s.file_bytes])


def _physical(
    entry: int, loads: list[LoadSegment], image: memoryview, table: int, count: int
) -> int:
    """The entry's physical address: e_entry may be virtual (vmlinux since Linux 2.6.22 is not)."""
    if any(s.gpa <= entry < s.gpa + s.size_bytes for s in loads):
        return entry
    for index in range(count):
        kind, _, _, vaddr, paddr, _, size_bytes, _ = _SEGMENT.unpack_from(
            image, table + index * _SEGMENT.size
        )
        if kind == _PT_LOAD and vaddr <= entry < vaddr + size_bytes:
            return int(entry - vaddr + paddr)
    return entry


def _pvh_entry(notes: memoryview) -> Gpa | None:
    for name, kind, value in _notes(notes[:_NOTES_MAX_BYTES]):
        if name == b"Xen\0" and kind == _XEN_ELFNOTE_PHYS32_ENTRY and len(value) in (4, 8):
            return Gpa(int.from_bytes(value, "little"))
    return None


def _notes(data: memoryview) -> Iterator[tuple[bytes, int, bytes]]:
    at = 0
    while at + _NOTE.size <= len(data):
        name_bytes, value_bytes, kind = _NOTE.unpack_from(data, at)
        name_at = at + _NOTE.size
        value_at = name_at + (name_bytes + 3 & ~3)
        at = value_at + (value_bytes + 3 & ~3)
        if at > len(data) + 3:
            return
        name = bytes(data[name_at : name_at + name_bytes])
        yield name, kind, bytes(data[value_at : value_at + value_bytes])
