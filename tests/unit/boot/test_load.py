"""Loading kernels: every kind lands where it should, and what cannot work says why."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from avmm.boot.bzimage import unpack
from avmm.boot.load import BootSource, load
from avmm.errors import ConfigError
from avmm.mem import layout
from avmm.mem.guest import GuestMemory
from avmm.units import GIB, MIB
from fakes.kernels import (
    BSS_BYTES,
    CODE,
    COMPRESSIONS,
    ENTRY,
    PVH_ENTRY,
    bzimage,
    elf_kernel,
)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory.create(64 * MIB)
    yield memory
    memory.close()


class Boot:
    """Writes the files of a boot and loads them."""

    def __init__(self, memory: GuestMemory, folder: Path) -> None:
        self.memory = memory
        self.folder = folder

    def __call__(self, kernel: bytes, initrd: bytes | None = None, **more: object):  # type: ignore[no-untyped-def]
        kernel_path = self.folder / "kernel"
        kernel_path.write_bytes(kernel)
        initrd_path = None
        if initrd is not None:
            (self.folder / "initrd").write_bytes(initrd)
            initrd_path = str(self.folder / "initrd")
        values: dict[str, object] = {"cmdline": "console=ttyS0", "cpus": 2, **more}
        return load(self.memory, BootSource(str(kernel_path), initrd_path, **values))  # type: ignore[arg-type]


@pytest.fixture
def boot(memory: GuestMemory, tmp_path: Path) -> Boot:
    return Boot(memory, tmp_path)


def test_an_elf_kernel_with_a_pvh_note_is_entered_there_in_32_bit_mode(
    memory: GuestMemory, boot: Boot
) -> None:
    entry = boot(elf_kernel())
    assert entry.general == {"rip": PVH_ENTRY, "rbx": layout.PVH_START_INFO}
    assert (entry.cr0 & 1, entry.cr0 >> 31, entry.efer) == (1, 0, 0)
    assert memory.read(ENTRY, len(CODE)) == CODE
    assert memory.read(ENTRY + len(CODE), BSS_BYTES) == bytes(BSS_BYTES)


def test_the_pvh_start_info_leads_to_everything(memory: GuestMemory, boot: Boot) -> None:
    boot(elf_kernel(), b"the initrd")
    info = struct.unpack("<IIIIQQQQII", memory.read(layout.PVH_START_INFO, 56))
    magic, version, _, modules, modules_at, cmdline, rsdp, map_at, entries, _ = info
    assert (magic, version, modules) == (0x336EC578, 1, 1)
    initrd_at, initrd_bytes = struct.unpack("<QQ", memory.read(modules_at, 16))
    assert memory.read(initrd_at, initrd_bytes) == b"the initrd"
    assert memory.read(cmdline, 14) == b"console=ttyS0\0"
    assert memory.read(rsdp, 8) == b"RSD PTR "
    rows = [struct.unpack("<QQII", memory.read(map_at + 24 * i, 24)) for i in range(entries)]
    assert sum(size for _, size, kind, _ in rows if kind == 1) == 63 * MIB + layout.EBDA


def test_without_a_note_the_64_bit_entry_gets_a_zero_page(memory: GuestMemory, boot: Boot) -> None:
    entry = boot(elf_kernel(pvh=False), b"i" * 5000)
    assert entry.general["rip"] == ENTRY
    assert entry.general["rsi"] == layout.ZERO_PAGE
    assert entry.cr0 >> 31 == 1
    assert entry.cr3 == layout.PAGE_TABLES
    assert entry.efer == 0x500
    page = memory.read(layout.ZERO_PAGE, 4096)
    initrd_at, initrd_bytes = struct.unpack_from("<II", page, 0x218)
    assert initrd_bytes == 5000
    assert initrd_at % 4096 == 0
    assert initrd_at + 5000 <= 64 * MIB
    assert memory.read(initrd_at, 5000) == b"i" * 5000
    assert struct.unpack_from("<I", page, 0x228)[0] == layout.CMDLINE
    assert struct.unpack_from("<Q", page, 0x70)[0] == layout.ACPI_TABLES
    assert page[0x1E8] == 3


def test_page_tables_map_the_first_4_gib_one_to_one(memory: GuestMemory, boot: Boot) -> None:
    entry = boot(elf_kernel(pvh=False))

    def row(table: int, index: int) -> int:
        return int.from_bytes(memory.read(table + 8 * index, 8), "little")

    for address in (0, ENTRY, 3 * GIB + 0x123000, 4 * GIB - 1):
        pdpt = row(entry.cr3, address >> 39) & ~0xFFF
        directory = row(pdpt, address >> 30) & ~0xFFF
        page = row(directory, address >> 21 & 511)
        assert page & 0x83 == 0x83
        assert (page & ~0xFFF) + (address & 0x1F_FFFF) == address


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_bzimages_payload_is_unpacked_here(memory: GuestMemory, boot: Boot, name: str) -> None:
    kernel = elf_kernel()
    entry = boot(bzimage(COMPRESSIONS[name](kernel), unpacked_bytes=len(kernel)))
    assert entry.general["rip"] == PVH_ENTRY
    assert memory.read(ENTRY, len(CODE)) == CODE


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_large_payload_arrives_whole_through_every_unpacker(
    memory: GuestMemory, boot: Boot, name: str
) -> None:
    code = bytes(9 * MIB) + CODE + bytes(100_000) + CODE
    kernel = elf_kernel(code=code)
    boot(bzimage(COMPRESSIONS[name](kernel), unpacked_bytes=len(kernel)))
    assert memory.read(ENTRY, len(code)) == code


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_truncated_payload_is_an_error(boot: Boot, name: str) -> None:
    kernel = elf_kernel(code=CODE * 200)
    packed = COMPRESSIONS[name](kernel)
    with pytest.raises(ConfigError, match=r"damaged|too early|cut off"):
        boot(bzimage(packed[: len(packed) * 2 // 3]))


def test_a_payload_is_unpacked_piece_by_piece_whatever_it_becomes() -> None:
    block_bytes, blocks = 128 << 10, 160
    frame = b"\x28\xb5\x2f\xfd\x00\x70"  # a window of 16 MiB, no size
    for index in range(blocks):  # of one byte, repeated
        frame += struct.pack("<I", (index == blocks - 1) | 1 << 1 | block_bytes << 3)[:3] + b"A"
    assert len(frame) < 1 << 10
    chunks = unpack(memoryview(frame + struct.pack("<I", blocks * block_bytes)))
    assert chunks is not None
    pieces = list(chunks)
    assert sum(map(len, pieces)) == blocks * block_bytes
    assert max(map(len, pieces)) <= 4 * MIB


def test_an_unknown_compression_is_left_to_the_guest(memory: GuestMemory, boot: Boot) -> None:
    image = bzimage(b"\x89LZO payload")
    entry = boot(image)
    assert entry.general == {
        "rip": ENTRY + 0x200,
        "rsp": layout.BOOT_STACK_TOP,
        "rsi": layout.ZERO_PAGE,
    }
    assert memory.read(ENTRY, 0x400) == b"\x90" * 0x400
    assert memory.read(layout.ZERO_PAGE + 0x202, 4) == b"HdrS"
    assert memory.read(layout.ZERO_PAGE + 0x210, 1) == b"\xff"


def test_each_format_can_be_forced(memory: GuestMemory, boot: Boot) -> None:
    image = bzimage(COMPRESSIONS["gzip"](elf_kernel()))
    assert boot(image, kernel_format="pvh").general["rip"] == PVH_ENTRY
    assert boot(image, kernel_format="elf64").general["rip"] == ENTRY
    assert boot(image, kernel_format="bzimage").general["rip"] == ENTRY + 0x200
    with pytest.raises(ConfigError, match="no PVH entry"):
        boot(elf_kernel(pvh=False), kernel_format="pvh")
    with pytest.raises(ConfigError, match="not a bzImage"):
        boot(elf_kernel(), kernel_format="bzimage")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "is empty"),
        (b"\x1f\x8b" + bytes(600), "gzip file"),
        (b"#!/bin/sh\n" + bytes(600), "a script"),
        (b"070701" + bytes(600), "cpio"),
        (bytes(56) + b"ARM\x64" + bytes(600), "AArch64"),
        (bytes(2000), "not a kernel"),
        (elf_kernel(machine=183), "AArch64"),
        (elf_kernel()[:40], "cut off"),
        (elf_kernel()[:0x1800], "too early"),
        (elf_kernel(address=0x8000), "below 1 MiB"),
        (bzimage(b"x", protocol=0x0204), "2.04 is too old"),
        (bzimage(b"\x89", xloadflags=0), "no 64-bit entry"),
        (bzimage(b"x" * 5000)[:3000], "cut off"),
    ],
)
def test_what_is_no_kernel_is_refused_by_name(boot: Boot, image: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        boot(image)
    assert str(boot.folder / "kernel") in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(memory: GuestMemory, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(memory, BootSource(str(tmp_path / "none"), None, "", 1))
    with pytest.raises(ConfigError, match="Is a directory"):
        load(memory, BootSource(str(tmp_path), None, "", 1))


def test_memory_too_small_says_by_how_much(tmp_path: Path) -> None:
    memory = GuestMemory.create(20 * MIB)
    boot = Boot(memory, tmp_path)
    with pytest.raises(ConfigError, match=r"at least 47 MiB are needed, 27 MiB more"):
        boot(elf_kernel(), bytes(30 * MIB))
    memory.close()


def test_an_initrd_that_only_fits_above_4_gib_is_refused(tmp_path: Path) -> None:
    memory = GuestMemory.create(5 * GIB)
    (tmp_path / "kernel").write_bytes(elf_kernel())
    with (tmp_path / "initrd").open("wb") as file:
        file.truncate(3 * GIB)
    source = BootSource(str(tmp_path / "kernel"), str(tmp_path / "initrd"), "", 1)
    with pytest.raises(ConfigError, match="do not fit below"):
        load(memory, source)
    memory.close()


@pytest.mark.parametrize(
    ("line", "message"), [("a" * 2048, "2047"), ("a\nb", "single line"), ("\udcff", "UTF-8")]
)
def test_a_command_line_the_kernel_would_not_take_is_refused(
    boot: Boot, line: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        boot(elf_kernel(), cmdline=line)


def test_the_reset_vector_resets(memory: GuestMemory, boot: Boot) -> None:
    boot(elf_kernel())
    port = struct.pack("<H", layout.PORT_ACPI_RESET)
    assert memory.read(layout.RESET_VECTOR, 6) == b"\xba" + port + b"\xb0\x01\xee"
