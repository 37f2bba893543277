"""Registers answered in C: what a guest can change, what it may only ask for."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from avmm.bus.registers import Registers
from avmm.native import ffi, lib


@pytest.fixture
def registers() -> Iterator[Registers]:
    block = Registers(16)
    yield block
    block.close()


def guest_read(registers: Registers, offset: int, size: int) -> int | None:
    data = ffi.new("uint8_t[8]")
    if not lib.av_regs_read(registers.native, offset, size, data):
        return None
    return int.from_bytes(ffi.buffer(data, size)[:], "little")


def guest_write(registers: Registers, offset: int, size: int, value: int) -> bool:
    return lib.av_regs_write(registers.native, offset, size, value.to_bytes(size, "little"))


def test_only_writable_bits_change(registers: Registers) -> None:
    registers.define(4, 4, 0x11223344, writable=0x00FF00FF)
    assert guest_write(registers, 4, 4, 0xAAAAAAAA)
    assert guest_read(registers, 4, 4) == 0x11AA33AA


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_any_size_at_any_offset(registers: Registers, size: int) -> None:
    registers.define(0, 8, 0x0706050403020100)
    registers.define(8, 8, 0x0F0E0D0C0B0A0908)
    for offset in range(17 - size):
        expected = int.from_bytes(bytes(range(offset, offset + size)), "little")
        assert guest_read(registers, offset, size) == expected == registers.get(offset, size)


def test_what_is_past_the_end_reads_as_ones_and_takes_nothing(registers: Registers) -> None:
    registers.define(12, 4, 0, writable=0xFFFF_FFFF)
    assert guest_write(registers, 14, 4, 0x11223344)
    assert guest_read(registers, 14, 4) == 0xFFFF3344
    assert guest_read(registers, 100, 8) == 2**64 - 1
    assert guest_write(registers, 100, 8, 0)


def test_a_watched_bit_is_changed_by_put_alone(registers: Registers) -> None:
    registers.define(0, 2, 0, writable=0xFFFF)
    registers.watch(0, 2, 0x8000)
    assert guest_write(registers, 0, 2, 0x0123)
    assert not guest_write(registers, 0, 2, 0x8456)
    assert registers.get(0, 2) == 0x0123, "nothing of it was done"
    registers.put(0, 2, 0x8456)
    assert guest_read(registers, 0, 2) == 0x8456
    assert guest_write(registers, 0, 2, 0x8000), "the watched bit stays"
    registers.watch(0, 2, 0)
    assert guest_write(registers, 0, 2, 0)


def test_bytes_that_were_handed_over_are_no_guests(registers: Registers) -> None:
    registers.hand_over(4, 4, reads=True)
    assert guest_read(registers, 3, 2) is None
    assert guest_read(registers, 8, 4) == 0
    assert not guest_write(registers, 0, 8, 0)


def test_writes_alone_can_be_handed_over(registers: Registers) -> None:
    registers.define(4, 1, 0x12, writable=0xFF)
    registers.hand_over(4, 1, reads=False)
    assert guest_read(registers, 4, 1) == 0x12
    assert not guest_write(registers, 4, 1, 0x12), "though it would change nothing"


def test_a_block_is_found_where_it_was_moved(registers: Registers) -> None:
    offset = ffi.new("uint32_t *")
    assert not lib.av_regs_at(registers.native, 0, offset)
    assert not lib.av_regs_at(registers.native, 2**64 - 1, offset)
    registers.move(0x1000)
    assert lib.av_regs_at(registers.native, 0x100F, offset)
    assert offset[0] == 0xF
    assert not lib.av_regs_at(registers.native, 0x1010, offset)
    registers.move(None)
    assert not lib.av_regs_at(registers.native, 0x1000, offset)


@pytest.mark.parametrize("seed", range(4))
def test_random_accesses_are_as_a_plain_model_has_them(registers: Registers, seed: int) -> None:
    source = random.Random(seed)
    writable, watched = source.randbytes(16), source.randbytes(16)
    model = bytearray(16)
    for at in range(16):
        registers.define(at, 1, 0, writable=writable[at])
        registers.watch(at, 1, watched[at])
    for _ in range(2000):
        offset, size = source.randrange(20), source.choice((1, 2, 4, 8))
        value = source.getrandbits(8 * size)
        new = bytearray(model)
        for at, byte in enumerate(value.to_bytes(size, "little"), offset):
            if at < 16:
                new[at] = model[at] & ~writable[at] | byte & writable[at]
        asked = any((a ^ b) & w for a, b, w in zip(model, new, watched, strict=True))
        assert guest_write(registers, offset, size, value) is not asked
        if asked:
            registers.put(offset, size, value)
        model = new
        whole = bytes(model) + b"\xff" * 12
        read = guest_read(registers, offset, size)
        assert read == int.from_bytes(whole[offset : offset + size], "little")
