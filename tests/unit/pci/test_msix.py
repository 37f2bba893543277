"""MSI-X: which vectors are connected to which message, and what waits."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from avmm.bus.region import Deferred
from avmm.errors import HostError
from avmm.pci import function as header
from avmm.pci.function import Function, Identity
from avmm.pci.msix import (
    CAPABILITY_ID,
    CONTROL_ENABLE,
    CONTROL_MASK_ALL,
    ENTRY_BYTES,
    ENTRY_CONTROL,
    Msix,
)
from avmm.pci.root import RootComplex
from fakes.pci_host import ECAM, HIGH, LOW, Cpu, FakeMessages

TABLE, PBA = 0x800, 0x400
ADDRESS = 0xFEE0_2004
VECTORS = 5


class Part:
    """Forwards table and pending bits, as a transport does."""

    msix: Msix

    def read(self, offset: int, size: int) -> int:
        if offset >= TABLE:
            return self.msix.read_table(offset - TABLE, size)
        return self.msix.read_pending(offset - PBA, size)

    def write(self, offset: int, size: int, value: int) -> Deferred | None:
        return self.msix.write_table(offset - TABLE, size, value) if offset >= TABLE else None


@dataclass
class Bench:
    cpu: Cpu
    msix: Msix
    messages: FakeMessages
    refused: list[None]

    async def control(self, value: int) -> None:
        at = self.cpu.read(self.cpu.config(1) + header.CAPABILITIES_POINTER, 1)
        assert self.cpu.read(self.cpu.config(1) + at, 1) == CAPABILITY_ID
        await self.cpu.write(self.cpu.config(1) + at + 2, 2, value)

    async def entry(self, vector: int, address: int = ADDRESS, *, masked: bool = False) -> None:
        at = LOW.gpa + TABLE + ENTRY_BYTES * vector
        await self.cpu.write(at, 8, address)
        await self.cpu.write(at + 8, 4, 0x30 + vector)
        await self.mask(vector, masked)

    async def mask(self, vector: int, masked: bool) -> None:
        at = LOW.gpa + TABLE + ENTRY_BYTES * vector + ENTRY_CONTROL
        await self.cpu.write(at, 4, int(masked))

    def raised(self, vector: int) -> tuple[int, int] | None:
        """Write the vector's eventfd; the message it sends at once."""
        os.eventfd_write(self.msix.fd(vector), 1)
        return self.messages.sent(self.msix.fd(vector))

    def pending(self) -> int:
        return self.cpu.read(LOW.gpa + PBA, 8)


@pytest.fixture
async def bench() -> Iterator[Bench]:  # type: ignore[misc]
    root = RootComplex(ECAM, (LOW, HIGH))
    function = Function(Identity(1, 2, 3))
    part, messages = Part(), FakeMessages()
    bar = function.add_bar(0x1000, part)
    part.msix = Msix(function, bar, messages, vectors=VECTORS, table_offset=TABLE, pba_offset=PBA)
    refused: list[None] = []
    part.msix.on_refused = lambda: refused.append(None)
    root.add(1, function)
    cpu = Cpu(root)
    cpu.registers.append(part.msix.table)
    await cpu.write(cpu.config(1) + header.COMMAND, 2, header.COMMAND_MEMORY)
    cpu.exits = 0
    yield Bench(cpu, part.msix, messages, refused)
    part.msix.close()
    root.close()


@pytest.mark.spec("4.1.1", "meet the PCI specification")
async def test_the_capability_tells_of_table_and_pending_bits(bench: Bench) -> None:
    at = bench.cpu.config(1) + 0x40
    assert bench.cpu.read(at + 2, 2) == VECTORS - 1
    assert bench.cpu.read(at + 4, 4) == TABLE
    assert bench.cpu.read(at + 8, 4) == PBA


async def test_every_entry_begins_masked(bench: Bench) -> None:
    for vector in range(VECTORS):
        at = LOW.gpa + TABLE + ENTRY_BYTES * vector
        assert [bench.cpu.read(at + o, 4) for o in (0, 4, 8, 12)] == [0, 0, 0, 1]


@pytest.mark.spec("4.1.1", "meet the PCI specification")
async def test_a_vector_sends_its_message_when_it_is_on_and_unmasked(bench: Bench) -> None:
    await bench.entry(2)
    assert bench.cpu.exits == 0, "nothing follows from it yet"
    assert bench.raised(2) is None
    await bench.control(CONTROL_ENABLE)
    assert bench.messages.sent(bench.msix.fd(2)) == (ADDRESS, 0x32)
    assert bench.raised(2) == (ADDRESS, 0x32)
    assert bench.raised(1) is None


@pytest.mark.spec("4.1.1", "meet the PCI specification")
async def test_what_a_masked_vector_raised_is_pending_and_sent_later(bench: Bench) -> None:
    await bench.control(CONTROL_ENABLE)
    await bench.entry(1)
    await bench.entry(3)
    await bench.mask(3, True)
    assert bench.raised(3) is None
    assert bench.raised(3) is None
    assert bench.pending() == 0b1000
    await bench.mask(3, False)
    assert bench.messages.sent(bench.msix.fd(3)) == (ADDRESS, 0x33)
    assert bench.pending() == 0
    await bench.mask(3, True)
    assert bench.pending() == 0


@pytest.mark.spec("4.1.1", "meet the PCI specification")
async def test_one_bit_masks_all(bench: Bench) -> None:
    await bench.entry(0)
    await bench.control(CONTROL_ENABLE | CONTROL_MASK_ALL)
    await bench.entry(1)
    assert bench.raised(0) is None
    assert bench.raised(1) is None
    assert bench.pending() == 0b11
    await bench.control(CONTROL_ENABLE)
    assert bench.messages.sent(bench.msix.fd(0)) == (ADDRESS, 0x30)
    assert bench.messages.sent(bench.msix.fd(1)) == (ADDRESS, 0x31)


async def test_switching_it_off_disconnects(bench: Bench) -> None:
    switched: list[bool] = []
    bench.msix.on_enable = lambda: switched.append(bench.msix.enabled)
    await bench.entry(0)
    await bench.control(CONTROL_ENABLE)
    await bench.control(CONTROL_ENABLE | CONTROL_MASK_ALL)
    await bench.control(0)
    assert bench.messages.connected == {}
    assert switched == [True, False]


async def test_a_new_message_of_a_masked_entry_costs_no_exit_but_the_unmasking(
    bench: Bench,
) -> None:
    await bench.control(CONTROL_ENABLE)
    await bench.entry(0)
    bench.cpu.exits = 0
    await bench.mask(0, True)
    at = LOW.gpa + TABLE
    await bench.cpu.write(at, 4, ADDRESS + 0x1000)
    await bench.cpu.write(at + 8, 4, 0x77)
    await bench.mask(0, False)
    assert bench.cpu.exits == 2
    assert bench.raised(0) == (ADDRESS + 0x1000, 0x77)


async def test_a_change_of_an_unmasked_entry_is_followed(bench: Bench) -> None:
    await bench.control(CONTROL_ENABLE)
    await bench.entry(0)
    await bench.cpu.write(LOW.gpa + TABLE + 8, 4, 0x99)
    assert bench.raised(0) == (ADDRESS, 0x99)


@pytest.mark.parametrize("size", [1, 2, 8])
async def test_the_table_takes_every_size(bench: Bench, size: int) -> None:
    await bench.control(CONTROL_ENABLE)
    entry = ADDRESS.to_bytes(8, "little") + bytes([0x44, 0, 0, 0]) + bytes(4)
    for at in range(0, ENTRY_BYTES, size):
        value = int.from_bytes(entry[at : at + size], "little")
        await bench.cpu.write(LOW.gpa + TABLE + ENTRY_BYTES * 4 + at, size, value)
    assert bench.raised(4) == (ADDRESS, 0x44)


@pytest.mark.parametrize("address", [0, 0x1000, 0xFED0_0000, 1 << 32 | ADDRESS, 2**64 - 4])
async def test_an_address_that_is_no_interrupts_sends_nothing(bench: Bench, address: int) -> None:
    await bench.control(CONTROL_ENABLE)
    await bench.entry(0, address)
    assert bench.messages.connected == {}
    assert bench.refused == [None]
    await bench.mask(0, True)
    await bench.entry(0)
    assert bench.raised(0) == (ADDRESS, 0x30)


async def test_a_message_that_kvm_refuses_sends_nothing(bench: Bench) -> None:
    await bench.control(CONTROL_ENABLE)
    await bench.entry(0)
    bench.messages.refuse = errno.EINVAL
    await bench.entry(0, ADDRESS + 0x8000)
    assert bench.messages.connected == {}
    assert bench.refused
    bench.messages.refuse = 0
    await bench.entry(0, masked=True)
    await bench.mask(0, False)
    assert bench.raised(0) == (ADDRESS, 0x30)


async def test_a_message_for_which_the_host_has_no_memory_is_an_error(bench: Bench) -> None:
    """And not the guest's mistake, which would wait for that interrupt for ever."""
    await bench.control(CONTROL_ENABLE)
    bench.messages.refuse = errno.ENOMEM
    with pytest.raises(HostError, match="KVM_SET_GSI_ROUTING"):
        await bench.entry(0)
    assert bench.refused == []


def test_too_many_vectors_say_so_and_leave_nothing() -> None:
    function = Function(Identity(1, 2, 3))
    bar = function.add_bar(0x10000, Part())
    before = os.listdir("/proc/self/fd")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(before) + 20, hard))
    try:
        with pytest.raises(HostError, match="ulimit -n"):
            Msix(function, bar, FakeMessages(), vectors=500, table_offset=TABLE, pba_offset=PBA)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert os.listdir("/proc/self/fd") == before
    function.close()


async def test_what_lies_past_the_table_is_nothing(bench: Bench) -> None:
    await bench.control(CONTROL_ENABLE)
    end = LOW.gpa + TABLE + ENTRY_BYTES * VECTORS
    await bench.cpu.write(end, 8, 0)
    await bench.cpu.write(end - 4, 8, 0)  # the last entry's control, and what is not there
    assert bench.cpu.read(LOW.gpa + PBA + 8, 8) == 0
    assert len(bench.refused) == 1


async def test_the_table_follows_the_bar(bench: Bench) -> None:
    await bench.control(CONTROL_ENABLE)
    await bench.entry(0)
    await bench.cpu.write(bench.cpu.config(1) + header.BAR0, 8, HIGH.gpa)
    assert bench.cpu.read(HIGH.gpa + TABLE + 8, 4) == 0x30
    assert bench.cpu.read(LOW.gpa + TABLE + 8, 4) == 0xFFFF_FFFF
    assert bench.raised(0) == (ADDRESS, 0x30)
