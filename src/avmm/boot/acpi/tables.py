"""The ACPI tables of a hardware-reduced machine (ACPI 6.4 chapters 4 and 5)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from avmm.boot.acpi import aml
from avmm.errors import ConfigError
from avmm.mem import layout
from avmm.units import Gpa

_OEM_ID = b"AVMM  "
_OEM_TABLE_ID = b"AVMMMACH"
_CREATOR_ID = b"AVMM"

_FADT_BYTES = 276
_FADT_MINOR = 4
_FADT_RESET_REG_SUP = 1 << 10
_FADT_HW_REDUCED_ACPI = 1 << 20
_IAPC_BOOT_VGA_NOT_PRESENT = 1 << 2
_GAS_SYSTEM_IO = 1
_GAS_BYTE_ACCESS = 1

_MADT_LOCAL_APIC = 0
_MADT_IOAPIC = 1
_MADT_LOCAL_APIC_NMI = 4
_SLEEP_TYPE_S5 = 5


@dataclass(frozen=True, slots=True)
class AcpiMmioDevice:
    """A virtio-mmio device as the DSDT names it. index: counts from 0, unique."""

    index: int
    gpa: Gpa
    size_bytes: int
    gsi: int


@dataclass(frozen=True, slots=True)
class AcpiPciRoot:
    """A PCI host bridge as MCFG and DSDT name it; bus 0 only. windows: (gpa, size in bytes)."""

    ecam: Gpa
    ecam_bytes: int
    windows: tuple[tuple[Gpa, int], ...]


def build_tables(
    cpus: int, devices: Sequence[AcpiMmioDevice] = (), pci: AcpiPciRoot | None = None
) -> tuple[bytes, Gpa]:
    """All tables as one block for layout.ACPI_TABLES, and the address of the RSDP in it.

    Raises ConfigError("devices") for what they have no words or no room for.
    """
    _check(devices, pci)
    blob = bytearray(64)  # the RSDP goes here, first: an OS scans for it from this address

    def place(table: bytes) -> int:
        gpa = layout.ACPI_TABLES + len(blob)
        blob.extend(table + bytes(-len(table) % 16))
        return gpa

    dsdt = place(_dsdt(cpus, devices, pci))
    tables = [place(_fadt(dsdt)), place(_madt(cpus))]
    if pci is not None:
        tables.append(place(_mcfg(pci)))
    xsdt = place(_table(b"XSDT", 1, struct.pack(f"<{len(tables)}Q", *tables)))
    rsdp = _rsdp(xsdt)
    blob[: len(rsdp)] = rsdp
    if len(blob) > layout.ACPI_TABLES_BYTES:
        raise ConfigError(
            "devices",
            f"{len(devices)} devices and {cpus} vCPUs: their ACPI tables take {len(blob)} bytes, "
            f"and there is room for {layout.ACPI_TABLES_BYTES}",
        )
    return bytes(blob), layout.ACPI_TABLES


def _check(devices: Sequence[AcpiMmioDevice], pci: AcpiPciRoot | None) -> None:
    for device in devices:
        if device.index > 0xFF or device.gpa + device.size_bytes > 1 << 32:
            raise ConfigError(
                "devices",
                f"Device {device.index} at {device.gpa:#x}: a device of virtio-mmio is one of 256 "
                "below 4 GiB",
            )
    for gpa, size_bytes in pci.windows if pci is not None else ():
        if not 0 < size_bytes <= (1 << 64) - 1 - gpa:
            raise ConfigError("devices", f"PCI window of {size_bytes} bytes at {gpa:#x}")


def checksum(data: bytes | bytearray) -> int:
    """The byte that makes the sum of `data` 0 modulo 256."""
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    header = struct.pack(
        "<4sIBB6s8sI4sI",
        *(signature, 36 + len(body), revision, 0),
        *(_OEM_ID, _OEM_TABLE_ID, 1, _CREATOR_ID, 1),
    )
    table = bytearray(header + body)
    table[9] = checksum(table)
    return bytes(table)


def _rsdp(xsdt: int) -> bytes:
    rsdp = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM_ID, 2, 0, 36, xsdt, 0))
    rsdp[8] = checksum(rsdp[:20])
    rsdp[32] = checksum(rsdp)
    return bytes(rsdp)


def _io_register(port: int) -> bytes:
    return struct.pack("<BBBBQ", _GAS_SYSTEM_IO, 8, 0, _GAS_BYTE_ACCESS, port)


def _fadt(dsdt: int) -> bytes:
    body = bytearray(_FADT_BYTES - 36)

    def put(at: int, data: bytes) -> None:
        body[at - 36 : at - 36 + len(data)] = data

    # The keyboard controller is not announced, though its reset command works: Linux would spend
    # more than a second on the search for a keyboard.
    put(109, struct.pack("<H", _IAPC_BOOT_VGA_NOT_PRESENT))
    put(112, struct.pack("<I", _FADT_RESET_REG_SUP | _FADT_HW_REDUCED_ACPI))
    put(116, _io_register(layout.PORT_ACPI_RESET))
    put(128, b"\x01")
    put(131, bytes([_FADT_MINOR]))
    put(140, struct.pack("<Q", dsdt))
    put(244, _io_register(layout.PORT_ACPI + 0))
    put(256, _io_register(layout.PORT_ACPI + 1))
    return _table(b"FACP", 6, bytes(body))


def _madt(cpus: int) -> bytes:
    # No PCAT_COMPAT: an OS in hardware-reduced mode does not touch the PIC.
    body = bytearray(struct.pack("<II", layout.LAPIC, 0))
    for apic_id in range(cpus):
        body += struct.pack("<BBBBI", _MADT_LOCAL_APIC, 8, apic_id, apic_id, 1)
    body += struct.pack("<BBBBII", _MADT_IOAPIC, 12, 0, 0, layout.IOAPIC, 0)
    body += struct.pack("<BBBHB", _MADT_LOCAL_APIC_NMI, 6, 0xFF, 0, 1)
    return _table(b"APIC", 5, bytes(body))


def _mcfg(pci: AcpiPciRoot) -> bytes:
    return _table(b"MCFG", 1, struct.pack("<8xQHBB4x", pci.ecam, 0, 0, 0))


def _dsdt(cpus: int, devices: Sequence[AcpiMmioDevice], pci: AcpiPciRoot | None) -> bytes:
    s5 = aml.integer(_SLEEP_TYPE_S5)
    body = aml.name("\\_S5", aml.package(s5, s5, aml.ZERO, aml.ZERO))
    body += aml.scope(
        "\\_SB",
        *(_cpu(index) for index in range(cpus)),
        _serial(),
        _clock(),
        _pvpanic(),
        aml.device("PWRB", aml.name("_HID", aml.eisa_id("PNP0C0C")), aml.name("_UID", aml.ZERO)),
        _event_device(),
        *(_virtio_mmio(d) for d in devices),
        *(_pci_root(pci) if pci is not None else ()),
    )
    return _table(b"DSDT", 2, body)


def _cpu(index: int) -> bytes:
    return aml.device(
        f"C{index:03X}",
        aml.name("_HID", aml.string("ACPI0007")),
        aml.name("_UID", aml.integer(index)),
    )


def _serial() -> bytes:
    resources = (aml.io_ports(layout.PORT_COM1, 8), aml.interrupt(layout.GSI_COM1))
    return aml.device(
        "COM1",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.ZERO),
        aml.name("_CRS", aml.resource_template(*resources)),
    )


def _clock() -> bytes:
    resources = (aml.io_ports(layout.PORT_CMOS_INDEX, 2), aml.interrupt(layout.GSI_RTC))
    return aml.device(
        "RTC",
        aml.name("_HID", aml.eisa_id("PNP0B00")),
        aml.name("_CRS", aml.resource_template(*resources)),
    )


def _pvpanic() -> bytes:
    return aml.device(
        "PEVT",
        aml.name("_HID", aml.string("QEMU0001")),
        aml.name("_CRS", aml.resource_template(aml.io_ports(layout.PORT_PVPANIC, 1))),
        aml.name("_STA", aml.integer(0xF)),
    )


def _event_device() -> bytes:
    """The generic event device (5.6.9): its interrupt's method reads which events are up."""
    return aml.device(
        "GED",
        aml.name("_HID", aml.string("ACPI0013")),
        aml.name("_UID", aml.ZERO),
        aml.name("_CRS", aml.resource_template(aml.interrupt(layout.GSI_ACPI_EVENT))),
        aml.io_region("EVTR", layout.PORT_ACPI + 3, 1),
        aml.byte_field("EVTR", "EVTS"),
        aml.method(
            "_EVT",
            1,
            aml.store(aml.name_string("EVTS"), aml.LOCAL0),
            aml.if_(aml.bit_and(aml.LOCAL0, aml.ONE), aml.notify("\\_SB.PWRB", 0x80)),
        ),
    )


def _virtio_mmio(device: AcpiMmioDevice) -> bytes:
    resources = (aml.memory32_fixed(device.gpa, device.size_bytes), aml.interrupt(device.gsi))
    return aml.device(
        f"VM{device.index:02X}",
        aml.name("_HID", aml.string("LNRO0005")),
        aml.name("_UID", aml.integer(device.index)),
        aml.name("_CCA", aml.ONE),
        aml.name("_CRS", aml.resource_template(*resources)),
    )


def _pci_root(pci: AcpiPciRoot) -> tuple[bytes, ...]:
    """The host bridge, and the memory-mapped configuration space, which is to be declared as a
    motherboard resource (PCI Firmware 3.3 section 4.1.2)."""
    resources = (
        aml.bus_numbers(0, 0),
        aml.io_ports(layout.PORT_PCI_ADDRESS, layout.PORT_PCI_BYTES),
        aml.io_window(layout.PORT_PCI_DEVICES, layout.PORT_PCI_DEVICES_BYTES),
        *(aml.memory_window(gpa, size_bytes) for gpa, size_bytes in pci.windows),
    )
    bridge = aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A08")),
        aml.name("_CID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", aml.ZERO),
        aml.name("_SEG", aml.ZERO),
        aml.name("_BBN", aml.ZERO),
        aml.name("_CRS", aml.resource_template(*resources)),
        # The OS may control all it asks for: nothing here is the firmware's.
        aml.method("_OSC", 4, aml.return_(aml.ARG3)),
    )
    ecam = aml.memory32_fixed(pci.ecam, pci.ecam_bytes)
    board = aml.device(
        "MRES",
        aml.name("_HID", aml.eisa_id("PNP0C02")),
        aml.name("_CRS", aml.resource_template(ecam)),
    )
    return bridge, board
