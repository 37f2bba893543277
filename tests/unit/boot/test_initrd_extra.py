"""A second archive behind the initrd, and the first program it brings."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path

import pytest

from avmm import ConfigError
from avmm.agent import program
from avmm.boot import cpio
from avmm.boot.cmdline import with_rdinit
from avmm.boot.load import BootSource, load
from avmm.machine.config import Config
from avmm.mem import layout
from avmm.mem.guest import GuestMemory
from avmm.units import MIB
from fakes.kernels import elf_kernel

ENTRIES = [
    cpio.Entry("folder", stat.S_IFDIR | 0o755),
    cpio.Entry("folder/file", stat.S_IFREG | 0o640, b"12345"),
    cpio.Entry("link", stat.S_IFLNK | 0o777, b"/folder/file"),
]


def test_what_is_packed_is_what_cpio_unpacks(tmp_path: Path) -> None:
    packed = cpio.archive(ENTRIES)
    listed = subprocess.run(
        ["cpio", "-tv", "--quiet", "-n"], input=packed, capture_output=True, check=True
    ).stdout.decode()
    assert [line.split()[0] for line in listed.splitlines()] == [
        "drwxr-xr-x",
        "-rw-r-----",
        "lrwxrwxrwx",
    ]
    assert "link -> /folder/file" in listed
    subprocess.run(["cpio", "-i", "--quiet"], input=packed, cwd=tmp_path, check=True)
    assert (tmp_path / "folder/file").read_bytes() == b"12345"


@pytest.mark.parametrize("size", [1, 2, 3, 4, 4095, 4097])
def test_the_archive_stands_aligned_behind_the_initrd(tmp_path: Path, size: int) -> None:
    (tmp_path / "kernel").write_bytes(elf_kernel(pvh=False))
    (tmp_path / "initrd").write_bytes(b"i" * size)
    extra = cpio.archive(ENTRIES)
    memory = GuestMemory.create(64 * MIB)
    try:
        source = BootSource(
            str(tmp_path / "kernel"), str(tmp_path / "initrd"), "", 1, initrd_extra=extra
        )
        load(memory, source)
        page = memory.read(layout.ZERO_PAGE, 4096)
        at = int.from_bytes(page[0x218:0x21C], "little")
        total = int.from_bytes(page[0x21C:0x220], "little")
        assert at % 4096 == 0
        assert (total - len(extra)) % 4 == 0
        expected = b"i" * size + bytes(-size % 4) + extra
        assert bytes(memory.read(at, total)) == expected
    finally:
        memory.close()


@pytest.mark.parametrize(
    ("cmdline", "expected", "before"),
    [
        ("", "rdinit=/a", "/init"),
        ("quiet", "quiet rdinit=/a", "/init"),
        ("rdinit=/x quiet", "quiet rdinit=/a", "/x"),
        ("quiet rdinit=/x rdinit=/y", "quiet rdinit=/a", "/y"),
        ("quiet -- rdinit=/mine arg", "quiet rdinit=/a -- rdinit=/mine arg", "/init"),
        ('a="b  c" xrdinit=/z', 'a="b  c" xrdinit=/z rdinit=/a', "/init"),
    ],
)
def test_the_kernels_first_program_is_put_in_front(
    cmdline: str, expected: str, before: str
) -> None:
    assert with_rdinit(cmdline, "/a") == (expected, before)


def test_the_agent_brings_itself_and_a_socket_to_talk_by() -> None:
    config = Config(kernel="k", initrd="i", agent=True, cmdline="quiet rdinit=/sbin/mine")
    assert config.full_cmdline() == "quiet rdinit=/avmm-agent-init"
    assert config.next_init() == "/sbin/mine"
    assert [id for id, _ in config.all_devices()] == ["vsock0"]
    packed = program.agent_archive("/sbin/mine")
    assert program.PROGRAM.read_bytes() in packed
    assert b"/sbin/mine" in packed


def test_without_an_initrd_the_image_has_the_agent_itself() -> None:
    config = Config(kernel="k", agent=True)
    assert "rdinit" not in config.full_cmdline()
    assert [id for id, _ in config.all_devices()] == ["vsock0"]


def test_an_avmm_built_without_the_agent_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(program, "PROGRAM", tmp_path / "none")
    with pytest.raises(ConfigError, match="libc6-dev"):
        Config(kernel="k", initrd="i", agent=True)
