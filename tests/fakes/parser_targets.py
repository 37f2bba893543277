"""Targets for what Python parses, by name: each takes the bytes of an input and checks what has to
hold. `scripts/fuzz` gives them what atheris finds, tests/unit/fuzz the committed inputs.

What an input may raise is an error of ours that says whose fault it is; all else is a defect.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import Callable
from unittest import mock

from avmm.agent import protocol
from avmm.block.objects import http
from avmm.boot.acpi import tables
from avmm.boot.load import BootSource, KernelFormat, load
from avmm.bus.region import Call
from avmm.errors import ConfigError, GuestFault, HostError
from avmm.mem import layout
from avmm.mem.guest import GuestMemory
from avmm.native import ffi, lib
from avmm.pci.function import Function, Identity
from avmm.pci.root import MemoryWindow, RootComplex
from avmm.units import GIB, MIB, SECTOR_BYTES, Gpa, format_size, parse_size
from avmm.vhost_user import message
from fakes.transport_targets import virtio_mmio, virtio_pci

_SIZE_MAX = 1 << 63
_MEMORY_BYTES = 32 * MIB
_FORMATS: tuple[KernelFormat, ...] = ("auto", "bzimage", "pvh", "elf64")


def units(data: bytes) -> None:
    """A size, as an option has it."""
    text = data.decode(errors="ignore")
    try:
        size = parse_size(text, "fuzz")
    except ConfigError:
        return
    assert 0 <= size < _SIZE_MAX
    assert parse_size(format_size(size), "fuzz") == size


def kernel(data: bytes) -> None:
    """A kernel file, and an initrd of a length of its own."""
    if len(data) < 2:
        return
    how, file = data[0], data[2:]
    memory = GuestMemory.create(_MEMORY_BYTES)
    # What is below 1 MiB is written by what follows, with tables of the machine's own.
    fd, initrd_fd = os.memfd_create("kernel"), os.memfd_create("initrd")
    try:
        os.write(fd, file)
        os.ftruncate(initrd_fd, data[1] << 13)
        initrd = f"/proc/self/fd/{initrd_fd}" if data[1] else None
        source = BootSource(f"/proc/self/fd/{fd}", initrd, "", 1, kernel_format=_FORMATS[how & 3])
        with mock.patch.object(memory, "write", _Writes(memory).write):
            regs = load(memory, source)
        assert all(0 <= value < 1 << 64 for value in regs.general.values())
    except (ConfigError, HostError):
        pass
    finally:
        memory.close()
        os.close(fd)
        os.close(initrd_fd)


class _Writes:
    """Nothing that comes of a file lies over what the machine puts into memory itself."""

    def __init__(self, memory: GuestMemory) -> None:
        self._write = memory.write
        self._places: list[tuple[int, int]] = []

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        begin, end = gpa, gpa + len(data)
        if gpa < layout.HIGH_RAM:
            for other, other_end in self._places:
                assert end <= other or other_end <= begin, f"{begin:#x}-{end:#x} twice"
            self._places.append((begin, end))
        self._write(gpa, data)


def acpi(data: bytes) -> None:
    """Tables of any machine."""
    cpus, count, *rest = (*data[:2].ljust(2, b"\1"), *data[2:])
    words = iter(struct.unpack(f"<{len(rest) // 8}Q", bytes(rest[: len(rest) // 8 * 8])))
    devices = [
        tables.AcpiMmioDevice(index, Gpa(word >> 8), 1 << (word & 31), word & 0xFF)
        for index, word in zip(range(count), words, strict=False)
    ]
    pairs = zip(words, words, strict=False)
    windows = tuple((Gpa(gpa & (1 << 52) - 1), size) for gpa, size in pairs)
    pci = tables.AcpiPciRoot(layout.PCI_ECAM, layout.PCI_ECAM_BYTES, windows)
    try:
        blob, rsdp = tables.build_tables(1 + cpus % 255, devices, pci)
    except ConfigError:
        return
    assert len(blob) <= layout.ACPI_TABLES_BYTES
    xsdt = int.from_bytes(blob[24:32], "little") - rsdp
    size = int.from_bytes(blob[xsdt + 4 : xsdt + 8], "little")
    assert tables.checksum(blob[xsdt : xsdt + size]) == 0


def agent(data: bytes) -> None:
    """A frame of the guest's agent."""
    payload = data[8:]
    unpackers: tuple[Callable[[bytes], object], ...] = (
        protocol.unpack_clock,
        protocol.unpack_stat,
        lambda payload: [entry.name.encode(errors="surrogateescape") for entry in entries(payload)],
        protocol.unpack_error,
        protocol.unpack_window,
        protocol.unpack_number,
        protocol.unpack_exited,
    )
    entries = protocol.unpack_entries
    try:
        size, kind = protocol.parse_head(data[:8].ljust(8, b"\0"))
        assert size <= protocol.FRAME_MAX_BYTES
        protocol.check_hello(kind, payload)
    except (GuestFault, HostError):
        pass
    for unpack in unpackers:
        try:
            unpack(payload)
        except GuestFault:
            continue


def vhost_user(data: bytes) -> None:
    """A message of a front-end, with any number of descriptors."""
    fds, head, payload = data[:1], data[1:13].ljust(12, b"\0"), data[13:]
    try:
        header = message.parse_header(head)
        parsed = message.parse(header, payload[: header.size_bytes], int.from_bytes(fds) % 10)
    except GuestFault:
        return
    if parsed is None:
        return
    got = parsed.payload
    if isinstance(got, message.MemoryTable):
        assert 1 <= len(got.regions) <= message.REGIONS_MAX
    elif isinstance(got, message.ConfigAccess):
        assert 0 < len(got.data) <= message.CONFIG_BYTES_MAX
        assert len(message.config(got, got.data)) <= message.PAYLOAD_BYTES_MAX
    elif isinstance(got, message.InflightMemory):
        assert len(message.inflight(got)) == len(payload[: header.size_bytes])


class _Writer:
    """A connection that takes all."""

    def write(self, data: bytes) -> None:
        assert data.endswith(b"\r\n\r\n")

    async def drain(self) -> None:
        pass

    def close(self) -> None:
        pass

    async def wait_closed(self) -> None:
        pass


async def _use_http_disk(data: bytes) -> None:
    reader = asyncio.StreamReader(limit=64 << 10)
    reader.feed_data(data)
    reader.feed_eof()
    writer = _Writer()

    async def connect(*_: object, **__: object) -> tuple[asyncio.StreamReader, _Writer]:
        if reader.at_eof():
            raise ConnectionRefusedError
        return reader, writer

    with mock.patch.object(asyncio, "open_connection", connect):
        try:
            async with http.HttpDisk("http://web.example/disk") as disk:
                assert 0 < disk.size < _SIZE_MAX
                assert disk.size % SECTOR_BYTES == 0
                size = min(disk.size, SECTOR_BYTES)
                assert len(await disk.read(disk.size - size, size)) == size
        except (ConfigError, HostError, OSError):
            return


def http_disk(data: bytes) -> None:
    """Answers of a web server."""
    runner = asyncio.Runner()
    with runner:
        runner.run(_use_http_disk(data))


class _Memory:
    """What is behind a BAR."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes

    def read(self, offset: int, size: int) -> int:
        assert 0 <= offset <= self._size_bytes - size
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        assert 0 <= offset <= self._size_bytes - size


def pci(data: bytes) -> None:
    """Accesses of a guest to configuration space and to where BARs may be."""
    low = MemoryWindow(layout.PCI_MEMORY, layout.PCI_MEMORY_BYTES)
    high = MemoryWindow(Gpa(4 * GIB), layout.PCI_MEMORY_HIGH_BYTES)
    root = RootComplex(layout.PCI_ECAM, (low, high))
    functions = [Function(Identity(0x1AF4, 0x1040 + index, 0xFF_0000)) for index in range(2)]
    for index, function in enumerate(functions):
        function.add_bar(4096 << index, _Memory(4096 << index))
        function.add_bar(1 << 20, _Memory(1 << 20))
        function.add_capability(9, bytes(14), writable=b"\xff" * 4)
        function.add_window(0x80, 8, _Memory(8))
        root.add(index + 1, function)
    data_at = ffi.new("uint8_t[8]")
    try:
        for at in range(0, len(data) - 11, 12):
            where, how, value = struct.unpack_from("<HBxQ", data, at)
            size = 1 << (how & 3)
            if how & 4:
                window = (low, high)[how >> 3 & 1]
                offset = value % window.size_bytes // size * size
                found = root.find(window.gpa + offset, size)
                assert found is None or window.holds(found[0].gpa or 0, found[0].size_bytes)
                root.memory(window).read(offset, size)
                root.memory(window).write(offset, size, 0)
                continue
            device, offset = 1 + (where >> 8 & 1), where & 0xFF
            registers = functions[device - 1].registers.native
            data_at[0:8] = value.to_bytes(8, "little")
            # As a vCPU does it: what is not answered in C comes here.
            if how & 8:
                if not lib.av_regs_write(registers, offset, size, data_at):
                    call = root.write((device << 15) + offset, size, value & (1 << 8 * size) - 1)
                    if isinstance(call, Call):
                        call.action()
            elif not lib.av_regs_read(registers, offset, size, data_at):
                root.read((device << 15) + offset, size)
            for function in functions:
                assert function.registers.get(0, 2) == 0x1AF4
                for bar in function.bars:
                    assert bar.gpa is None or bar.gpa % bar.size_bytes == 0
    finally:
        root.close()


TARGETS: dict[str, Callable[[bytes], None]] = {
    "py_acpi": acpi,
    "py_agent": agent,
    "py_http": http_disk,
    "py_kernel": kernel,
    "py_pci": pci,
    "py_units": units,
    "py_vhost_user": vhost_user,
    "py_virtio_mmio": virtio_mmio,
    "py_virtio_pci": virtio_pci,
}
