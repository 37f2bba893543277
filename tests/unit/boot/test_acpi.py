"""ACPI tables: found from the RSDP, sound, and saying what the machine has (ACPI 6.4)."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from avmm.boot.acpi import aml
from avmm.boot.acpi.tables import AcpiMmioDevice, AcpiPciRoot, build_tables
from avmm.errors import ConfigError
from avmm.mem import layout
from avmm.units import Gpa

DEVICES = [AcpiMmioDevice(i, Gpa(0xD000_0000 + 0x1000 * i), 0x200, 16 + i) for i in range(3)]
PCI = AcpiPciRoot(Gpa(0xE000_0000), 1 << 20, ((Gpa(0xC000_0000), 1 << 28), (Gpa(1 << 32), 1 << 34)))


class Tables:
    """Reads the block as a guest would."""

    def __init__(
        self,
        cpus: int = 2,
        devices: list[AcpiMmioDevice] = DEVICES,
        pci: AcpiPciRoot | None = None,
    ) -> None:
        self.blob, self.rsdp = build_tables(cpus, devices, pci)

    def at(self, gpa: int, size: int) -> bytes:
        start = gpa - layout.ACPI_TABLES
        return self.blob[start : start + size]

    def table(self, gpa: int) -> bytes:
        return self.at(gpa, struct.unpack("<I", self.at(gpa + 4, 4))[0])

    def all(self) -> dict[str, bytes]:
        xsdt = self.table(struct.unpack("<Q", self.at(self.rsdp + 24, 8))[0])
        found = {"XSDT": xsdt}
        for (gpa,) in struct.iter_unpack("<Q", xsdt[36:]):
            table = self.table(gpa)
            found[table[:4].decode()] = table
        found["DSDT"] = self.table(struct.unpack_from("<Q", found["FACP"], 140)[0])
        return found


def test_the_rsdp_is_where_an_os_looks_for_it_and_sound() -> None:
    tables = Tables()
    rsdp = tables.at(tables.rsdp, 36)
    assert 0xE0000 <= tables.rsdp < 0x100000
    assert tables.rsdp % 16 == 0
    assert (rsdp[:8], rsdp[15]) == (b"RSD PTR ", 2)
    assert sum(rsdp[:20]) % 256 == 0
    assert sum(rsdp) % 256 == 0


def test_every_table_is_reachable_and_its_checksum_right() -> None:
    tables = Tables().all()
    assert set(tables) == {"XSDT", "FACP", "APIC", "DSDT"}
    assert all(sum(table) % 256 == 0 for table in tables.values())


def test_the_fadt_is_of_a_hardware_reduced_machine_with_reset_and_sleep() -> None:
    fadt = Tables().all()["FACP"]
    (flags,) = struct.unpack_from("<I", fadt, 112)
    assert (len(fadt), fadt[8], fadt[131]) == (276, 6, 4)
    assert flags & 1 << 20
    assert flags & 1 << 10
    for at, port in ((116, 0x602), (244, 0x600), (256, 0x601)):
        assert struct.unpack_from("<BBBBQ", fadt, at) == (1, 8, 0, 1, port)
    assert fadt[128] == 1


@pytest.mark.parametrize("cpus", [1, 2, 8, 255])
def test_the_madt_has_each_cpu_and_the_ioapic(cpus: int) -> None:
    madt = Tables(cpus).all()["APIC"]
    entries, at = [], 44
    while at < len(madt):
        entries.append(madt[at : at + madt[at + 1]])
        at += madt[at + 1]
    apics = [e for e in entries if e[0] == 0]
    assert [(e[2], e[3], e[4]) for e in apics] == [(i, i, 1) for i in range(cpus)]
    [ioapic] = [e for e in entries if e[0] == 1]
    assert struct.unpack_from("<II", ioapic, 4) == (layout.IOAPIC, 0)


def test_each_virtio_device_has_its_registers_and_its_interrupt() -> None:
    dsdt = Tables().all()["DSDT"]
    assert dsdt.count(b"LNRO0005") == 3
    for device in DEVICES:
        assert aml.memory32_fixed(device.gpa, 0x200) + aml.interrupt(device.gsi) in dsdt


def test_the_pci_root_has_its_configuration_space_and_windows() -> None:
    tables = Tables(devices=[], pci=PCI).all()
    assert struct.unpack_from("<QHBB", tables["MCFG"], 44) == (PCI.ecam, 0, 0, 0)
    assert len(tables["MCFG"]) == 60
    dsdt = tables["DSDT"]
    assert aml.bus_numbers(0, 0) in dsdt
    low, high = (aml.memory_window(gpa, size_bytes) for gpa, size_bytes in PCI.windows)
    assert (low[0], len(low), high[0], len(high)) == (0x87, 26, 0x8A, 46)
    assert low in dsdt
    assert high in dsdt
    assert aml.memory32_fixed(PCI.ecam, PCI.ecam_bytes) in dsdt
    assert all(sum(table) % 256 == 0 for table in tables.values())


def test_windows_end_at_their_last_address() -> None:
    assert aml.memory_window(0xC000_0000, 0x1000_0000)[6:] == struct.pack(
        "<IIIII", 0, 0xC000_0000, 0xCFFF_FFFF, 0, 0x1000_0000
    )
    assert aml.io_window(0x1000, 0xF000)[6:] == struct.pack("<HHHHH", 0, 0x1000, 0xFFFF, 0, 0xF000)
    assert aml.bus_numbers(0, 0)[6:] == struct.pack("<HHHHH", 0, 0, 0, 0, 1)


def test_tables_that_do_not_fit_are_refused() -> None:
    many = [AcpiMmioDevice(i % 256, Gpa(0), 0x200, 16) for i in range(2000)]
    with pytest.raises(ConfigError, match="2000 devices"):
        build_tables(1, many)


@pytest.mark.parametrize(
    ("body", "encoded"),
    [
        (0, b"\x01"),
        (62, b"\x3f"),
        (63, b"\x41\x04"),
        (4093, b"\x4f\xff"),
        (4094, b"\x81\x00\x01"),
    ],
)
def test_package_lengths_count_themselves(body: int, encoded: bytes) -> None:
    assert aml.pkg_length(body) == encoded


@pytest.mark.parametrize(
    ("path", "encoded"),
    [
        ("_CRS", b"_CRS"),
        ("GED", b"GED_"),
        ("\\_SB", b"\\_SB_"),
        ("\\_SB.PWRB", b"\\\x2e_SB_PWRB"),
        ("A.B.C", b"\x2f\x03A___B___C___"),
        ("\\", b"\\\x00"),
    ],
)
def test_names_are_packed_in_segments_of_four(path: str, encoded: bytes) -> None:
    assert aml.name_string(path) == encoded


def test_a_name_segment_that_is_too_long_is_a_bug() -> None:
    with pytest.raises(ValueError, match="more than four"):
        aml.name_string("ABCDE")


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, b"\x00"),
        (1, b"\x01"),
        (2, b"\x0a\x02"),
        (0x100, b"\x0b\x00\x01"),
        (0x10000, b"\x0c\x00\x00\x01\x00"),
        (1 << 32, b"\x0e\x00\x00\x00\x00\x01\x00\x00\x00"),
    ],
)
def test_integers_take_the_shortest_form(value: int, encoded: bytes) -> None:
    assert aml.integer(value) == encoded


def test_eisa_ids_are_packed_as_the_specification_says() -> None:
    assert aml.eisa_id("PNP0501") == b"\x0c\x41\xd0\x05\x01"


@pytest.mark.skipif(shutil.which("iasl") is None, reason="iasl (acpica-tools) is not installed")
@pytest.mark.parametrize("name", ["FACP", "APIC", "MCFG", "DSDT"])
def test_the_reference_disassembler_takes_every_table(tmp_path: Path, name: str) -> None:
    (tmp_path / "table.aml").write_bytes(Tables(pci=PCI).all()[name])
    run = subprocess.run(
        ["iasl", "-d", "table.aml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "Error" not in run.stdout + run.stderr
    assert "Warning" not in run.stdout + run.stderr
