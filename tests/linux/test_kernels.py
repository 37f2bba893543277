"""Debian's three kernels, by every way into them."""

from __future__ import annotations

import pytest

import avmm
from linux.guest import Guests


@pytest.mark.parametrize(
    ("flavour", "image"),
    [
        *(("cloud", "vmlinuz"), ("generic", "vmlinuz"), ("rt", "vmlinuz")),
        pytest.param("cloud", "vmlinux", marks=pytest.mark.variant),
        pytest.param("generic", "vmlinux", marks=pytest.mark.variant),
        pytest.param("rt", "vmlinux", marks=pytest.mark.variant),
    ],
)
async def test_stock_kernel_reaches_user_space(guests: Guests, flavour: str, image: str) -> None:
    guest = await guests.boot('echo "FACT release $(uname -r)"', flavour=flavour, image=image)
    assert guest.fact("release") == guests.assets.version(flavour)
    assert guest.kind is avmm.ExitKind.POWEROFF


async def test_elf_boots_by_its_64_bit_entry(guests: Guests) -> None:
    script = 'echo "FACT release $(uname -r)"'
    guest = await guests.boot(script, image="vmlinux", kernel_format="elf64")
    assert guest.fact("release") == guests.assets.version("cloud")


async def test_bzimage_unpacks_itself_in_the_guest(guests: Guests) -> None:
    script = 'echo "FACT release $(uname -r)"'
    guest = await guests.boot(script, image="vmlinuz", kernel_format="bzimage")
    assert guest.fact("release") == guests.assets.version("cloud")
