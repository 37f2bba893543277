"""ELF64 kernels: checking, loading, and the PVH entry note."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
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
_ZEROES = memoryview(bytes(64 << 10))


@dataclass(frozen=True, slots=True)
class LoadSegment:
    """A PT_LOAD segment: `file_bytes` from `offset` go to `gpa`, the rest up to `size_bytes` is
    zero."""

    offset: int
    gpa: Gpa
    file_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ElfHeader:
    """What the front of the file says. notes: (offset, bytes) of each PT_NOTE segment."""

    segments: tuple[LoadSegment, ...]
    notes: tuple[tuple[int, int], ...]
    entry: Gpa

    @property
    def start(self) -> int:
        """Lowest guest physical address that is loaded."""
        return min(s.gpa for s in self.segments)

    @property
    def end(self) -> int:
        """First guest physical address behind the kernel, its zeroed part included."""
        return max(s.gpa + s.size_bytes for s in self.segments)


def parse(front: memoryview, name: str) -> ElfHeader:
    """Check an ELF64 x86-64 executable by its first bytes, the program headers included.

    name: for the ConfigError("kernel") of a bad one.
    """
    if len(front) < _HEADER.size:
        raise ConfigError("kernel", f"Kernel {name}: the ELF header is cut off")
    header = _HEADER.unpack_from(front)
    ident, machine, entry, table, entry_bytes, count = (
        *(header[0], header[2], header[4], header[5], header[9], header[10]),
    )
    if ident[4] != 2 or ident[5] != 1 or machine != _MACHINE_X86_64:
        what = _MACHINES.get(machine, f"ELF machine {machine}")
        raise ConfigError("kernel", f"Kernel {name} is for {what}; an x86-64 ELF is needed")
    if entry_bytes != _SEGMENT.size or table + count * _SEGMENT.size > len(front):
        raise ConfigError("kernel", f"Kernel {name}: the program header table is cut off")
    loads: list[LoadSegment] = []
    notes: list[tuple[int, int]] = []
    for index in range(count):
        kind, _, offset, vaddr, paddr, file_bytes, size_bytes, _ = _SEGMENT.unpack_from(
            front, table + index * _SEGMENT.size
        )
        if kind == _PT_NOTE:
            notes.append((offset, min(file_bytes, _NOTES_MAX_BYTES)))
        if kind != _PT_LOAD or not size_bytes:
            continue
        if file_bytes > size_bytes:
            raise ConfigError("kernel", f"Kernel {name}: segment {index} is damaged")
        loads.append(LoadSegment(offset, Gpa(paddr), file_bytes, size_bytes))
        if vaddr <= entry < vaddr + size_bytes and vaddr != paddr:
            entry += paddr - vaddr  # e_entry is virtual in kernels before Linux 2.6.22
    if not loads:
        raise ConfigError("kernel", f"Kernel {name}: no segment is to be loaded; is it an object?")
    return ElfHeader(tuple(loads), tuple(notes), Gpa(entry))


def load(
    memory: GuestMemory, header: ElfHeader, chunks: Iterable[bytes | memoryview], name: str
) -> Gpa | None:
    """Copy the file, which comes in `chunks`, to where its segments belong; the PVH entry, or
    None without such a note.

    Guest memory is fresh: stretches of zeroes are skipped, and their pages never touched.
    Raises ConfigError("kernel") when the file ends too early.
    """
    notes = [bytearray(size) for _, size in header.notes]
    at = 0
    for chunk in chunks:
        view = memoryview(chunk)
        for s in header.segments:
            _copy_part(memory, s, at, view)
        for buffer, (offset, size) in zip(notes, header.notes, strict=True):
            first, last = max(offset, at), min(offset + size, at + len(view))
            if first < last:
                buffer[first - offset : last - offset] = view[first - at : last - at]
        at += len(view)
    if at < max(s.offset + s.file_bytes for s in header.segments):
        raise ConfigError("kernel", f"Kernel {name}: the file ends after {at} bytes, too early")
    for buffer in notes:
        if (entry := _pvh_entry(memoryview(buffer))) is not None:
            return entry
    return None


def _copy_part(memory: GuestMemory, segment: LoadSegment, at: int, view: memoryview) -> None:
    """The part of `segment` that lies in `view`, which is the file from `at` on."""
    first = max(segment.offset, at)
    last = min(segment.offset + segment.file_bytes, at + len(view))
    for piece in range(first, last, len(_ZEROES)):
        data = view[piece - at : min(piece + len(_ZEROES), last) - at]
        if data != _ZEROES[: len(data)]:
            memory.write(segment.gpa + piece - segment.offset, data)


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
