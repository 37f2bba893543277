"""The kvm layer: tiny guests of a few instructions on this machine's /dev/kvm.

They are assembled for each test, enter at 1 MiB in 64-bit mode with the first 4 GiB mapped
one to one, and use general-purpose instructions only, so a software KVM runs them too.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

LINK = (
    *("-nostdlib", "-static", "-no-pie", "-Wl,-Ttext=0x100000", "-Wl,--build-id=none"),
    *("-Wl,-N", "-Wl,-z,noexecstack"),
)

PROLOGUE = """
.macro outb port, value
    mov $\\port, %dx
    mov $\\value, %al
    out %al, %dx
.endm
.macro inb port
    mov $\\port, %dx
    in %dx, %al
.endm
.macro putc value
    outb 0x3f8, \\value
.endm
.macro poweroff
    outb 0x600, 0x34      /* SLP_EN, SLP_TYP 5 */
1:  jmp 1b
.endm
.macro reboot
    outb 0x602, 1
1:  jmp 1b
.endm
.code64
.global _start
_start:
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        return
    here = Path(__file__).parent
    skip = pytest.mark.skip(reason="/dev/kvm is missing or not accessible")
    for item in items:
        if here in item.path.parents:
            item.add_marker(skip)


@pytest.fixture
def tiny_guest(tmp_path: Path) -> Callable[[str], Path]:
    """Assembles the body of a guest to an ELF kernel."""
    count = 0

    def assemble(body: str) -> Path:
        nonlocal count
        count += 1
        source = tmp_path / f"guest{count}.S"
        kernel = tmp_path / f"guest{count}.elf"
        source.write_text(PROLOGUE + body)
        subprocess.run(
            ["gcc", *LINK, "-o", str(kernel), str(source)],
            check=True,
        )
        return kernel

    return assemble
