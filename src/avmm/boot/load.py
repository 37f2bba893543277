"""Loads a kernel: the one entrance to boot/."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from avmm.boot import bzimage, cmdline, cpio, elf, entry, pvh, zeropage
from avmm.boot.acpi.tables import AcpiMmioDevice, AcpiPciRoot, build_tables
from avmm.boot.entry import EntryRegs
from avmm.boot.zeropage import Placement
from avmm.descriptors import Opener, closing_fd, open_path
from avmm.errors import ConfigError, HostError
from avmm.mem import layout
from avmm.mem.guest import GuestMemory
from avmm.units import MIB, PAGE_BYTES, Gpa, align_up

KernelFormat = Literal["auto", "bzimage", "pvh", "elf64"]

_FOREIGN = (
    (b"\x1f\x8b", "a gzip file; unpack it first"),
    (b"\xfd7zXZ", "an xz file; unpack it first"),
    (b"#!", "a script"),
    (b"070701", "a cpio archive; is it the initrd?"),
    (b"MZ", "an EFI program without a bzImage header"),
)


_RESET_CODE = b"\xba" + layout.PORT_ACPI_RESET.to_bytes(2, "little") + b"\xb0\x01\xee\xf4\xeb\xfd"
"""16-bit code for the reset vector: write 1 to the reset port, then halt.

Linux on a hardware-reduced machine expects EFI to reset it, whatever the FADT's reset register
says, and without EFI runtime services jumps to the firmware's entry in real mode instead.
"""


@dataclass(frozen=True, slots=True)
class BootSource:
    """What to boot. kernel_format: "auto", or the one way to take; see load().

    initrd_extra: a cpio archive to stand behind the initrd. opener: of the files.
    """

    kernel: str
    initrd: str | None
    cmdline: str
    cpus: int
    devices: Sequence[AcpiMmioDevice] = ()
    pci: AcpiPciRoot | None = None
    kernel_format: KernelFormat = "auto"
    initrd_extra: bytes = b""
    opener: Opener = open_path


@dataclass(frozen=True, slots=True)
class _Image:
    """A kernel ready to be placed.

    chunks: an ELF file, whose header is `elf`, or a bzImage's protected-mode part (elf is None),
    of `size_bytes`. setup: the bzImage's header, if it is one.
    """

    chunks: Iterable[bytes | memoryview]
    size_bytes: int
    elf: elf.ElfHeader | None
    setup: bzimage.SetupHeader | None

    @property
    def start(self) -> int:
        """Lowest guest address that is loaded."""
        if self.elf is not None:
            return self.elf.start
        assert self.setup is not None
        return _bzimage_address(self.setup)

    @property
    def end(self) -> int:
        """First guest address behind what the kernel needs while it starts."""
        if self.elf is not None:
            return self.elf.end
        assert self.setup is not None
        return _bzimage_address(self.setup) + max(self.setup.init_size, self.size_bytes)


def load(memory: GuestMemory, source: BootSource) -> EntryRegs:
    """Put kernel, initrd, command line and ACPI tables in guest memory; how to enter.

    An ELF kernel is entered by its PVH note, or in 64-bit mode when it has none. A bzImage is
    unpacked here when its compression is known, which saves the guest the time; otherwise the
    guest unpacks it itself. Blocks on file reads: call it off the loop.
    Raises ConfigError("kernel" | "initrd" | "memory" | "cmdline"), HostError("kernel" | "initrd").
    """
    with _mapped(source.kernel, "kernel", source.opener) as file:
        image = _open_image(file, source)
        limit = image.setup.cmdline_max if image.setup else cmdline.LINUX_MAX_BYTES
        line = cmdline.encode(source.cmdline, min(limit, layout.CMDLINE_MAX_BYTES - 1))
        with _mapped(source.initrd, "initrd", source.opener) as initrd:
            initrd_bytes = _initrd_bytes(source, initrd)
            _check_room(memory, source, image, initrd_bytes)
            pvh_entry = _place_kernel(memory, source, image)
            initrd_at = _place_initrd(memory, source, image, initrd)
        memory.write(layout.CMDLINE, line)
        tables, rsdp = build_tables(source.cpus, source.devices, source.pci)
        memory.write(layout.ACPI_TABLES, tables)
        memory.write(layout.RESET_VECTOR, _RESET_CODE)
        place = Placement(layout.CMDLINE, len(line), initrd_at, initrd_bytes, rsdp)
        return _enter(memory, source, image, pvh_entry, place)


@contextmanager
def _mapped(path: str | None, what: str, opener: Opener) -> Iterator[memoryview]:
    if path is None:
        yield memoryview(b"")
        return
    try:
        with closing_fd(open_boot_file(path, what, opener)) as fd:
            if os.fstat(fd).st_size == 0:
                raise ConfigError(what, f"{what.capitalize()} {path} is empty")
            mapping = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
    except OSError as e:
        raise _file_error(path, what, e) from e
    # Views of it may live on in an unpacked image's traceback; the last one unmaps.
    yield memoryview(mapping)


def open_boot_file(path: str, what: str, opener: Opener = open_path) -> int:
    """A kernel or an initrd, by `what`, for the caller to close. Raises as load()."""
    try:
        fd = opener(path, os.O_RDONLY)
    except OSError as e:
        raise _file_error(path, what, e) from e
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        os.close(fd)
        raise _file_error(path, what, IsADirectoryError(errno.EISDIR, "", path))
    return fd


def _file_error(path: str, what: str, e: OSError) -> ConfigError | HostError:
    if e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return HostError(what, op="open", path=path, errno=e.errno)
    return ConfigError(what, f"{what.capitalize()} {path}: {os.strerror(e.errno or 0)}")


def _open_image(file: memoryview, source: BootSource) -> _Image:
    name, wanted = source.kernel, source.kernel_format
    if bytes(file[:4]) == elf.MAGIC:
        if wanted == "bzimage":
            raise ConfigError("kernel", f"Kernel {name} is an ELF file, not a bzImage")
        return _Image([file], len(file), elf.parse(file, name), None)
    if not bzimage.is_bzimage(file):
        raise ConfigError(
            "kernel", f"Kernel {name} is {_describe(file)}; give a bzImage or vmlinux"
        )
    setup = bzimage.parse(file, name)
    payload = file[setup.payload_at : setup.payload_at + setup.payload_bytes]
    chunks = None if wanted == "bzimage" else bzimage.unpack(payload)
    if chunks is not None:
        try:
            first = next(chunks, b"")
        except ValueError as e:
            raise _damaged(name, e) from e
        header = elf.parse(memoryview(first), name)
        return _Image(itertools.chain([first], chunks), setup.payload_bytes, header, setup)
    if wanted in ("pvh", "elf64"):
        raise ConfigError("kernel", f"Kernel {name}: its payload cannot be unpacked on the host")
    if not setup.entry_64bit:
        raise ConfigError("kernel", f"Kernel {name} has no 64-bit entry point; is it 32-bit?")
    rest = file[setup.kernel_at :]
    return _Image([rest], len(rest), None, setup)


def _damaged(name: str, e: ValueError) -> ConfigError:
    return ConfigError("kernel", f"Kernel {name}: its compressed payload is damaged: {e}")


def _describe(file: memoryview) -> str:
    head = bytes(file[:6])
    if bytes(file[56:60]) == b"ARM\x64":
        return "a kernel for AArch64"
    for magic, what in _FOREIGN:
        if head.startswith(magic):
            return what
    return "not a kernel"


def _bzimage_address(setup: bzimage.SetupHeader) -> Gpa:
    return setup.pref_address if setup.relocatable else layout.HIGH_RAM


def _initrd_top(memory: GuestMemory, image: _Image) -> int:
    low_end = memory.ranges[0][1]
    limit = image.setup.initrd_max + 1 if image.setup and image.setup.initrd_max else low_end
    return min(low_end, limit)


def _check_room(memory: GuestMemory, source: BootSource, image: _Image, initrd_bytes: int) -> None:
    # What must lie in memory at the same time; how much a kernel allocates then is its own affair.
    loaded = align_up(image.end, PAGE_BYTES) + align_up(initrd_bytes, PAGE_BYTES)
    top = _initrd_top(memory, image)
    if loaded <= top:
        return
    if memory.size_bytes > top:
        raise ConfigError(
            "initrd",
            f"Initrd {source.initrd}: {initrd_bytes} bytes do not fit below {top >> 20} MiB, "
            "where this kernel wants it",
        )
    needed, has = -(-loaded // MIB), memory.size_bytes // MIB
    raise ConfigError(
        "memory",
        f"Memory of {has} MiB is too small for this kernel and initrd: at least {needed} MiB are "
        f"needed, {needed - has} MiB more",
    )


def _place_kernel(memory: GuestMemory, source: BootSource, image: _Image) -> Gpa | None:
    """Copy the kernel to its place; its PVH entry, if it has one."""
    if image.start < layout.HIGH_RAM:
        raise ConfigError(
            "kernel",
            f"Kernel {source.kernel} is linked at {image.start:#x}, below 1 MiB, where the "
            "machine's own tables are",
        )
    if image.elf is None:
        for chunk in image.chunks:
            memory.write(image.start, chunk)
        return None
    try:
        return elf.load(memory, image.elf, image.chunks, source.kernel)
    except ValueError as e:
        raise _damaged(source.kernel, e) from e


def _place_initrd(
    memory: GuestMemory, source: BootSource, image: _Image, initrd: memoryview
) -> Gpa:
    """As high as may be, so that it never stands in the way of the kernel's own growth."""
    if not initrd:
        return Gpa(0)
    top, size_bytes = _initrd_top(memory, image), _initrd_bytes(source, initrd)
    gpa = Gpa((top - size_bytes) // PAGE_BYTES * PAGE_BYTES)
    memory.write(gpa, initrd)
    memory.write(Gpa(gpa + size_bytes - len(source.initrd_extra)), source.initrd_extra)
    return gpa


def _initrd_bytes(source: BootSource, initrd: memoryview) -> int:
    if not source.initrd_extra:
        return len(initrd)
    return len(initrd) + cpio.padding(len(initrd)) + len(source.initrd_extra)


def _enter(
    memory: GuestMemory,
    source: BootSource,
    image: _Image,
    pvh_entry: Gpa | None,
    place: Placement,
) -> EntryRegs:
    if source.kernel_format == "pvh" and pvh_entry is None:
        raise ConfigError("kernel", f"Kernel {source.kernel} has no PVH entry (CONFIG_PVH)")
    if pvh_entry is not None and source.kernel_format != "elf64":
        pvh.write(memory, place)
        return entry.protected32(memory, pvh_entry, {"rbx": layout.PVH_START_INFO})
    zeropage.write(memory, image.setup.raw if image.setup else None, place)
    if image.elf is not None:
        rip = image.elf.entry
    else:
        assert image.setup is not None
        rip = Gpa(_bzimage_address(image.setup) + 0x200)
    return entry.long64(memory, rip, {"rsi": layout.ZERO_PAGE})
