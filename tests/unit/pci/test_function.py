"""Configuration space, BARs and the bus, as a guest's PCI code meets them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from avmm.bus.region import Deferred
from avmm.errors import BugError
from avmm.pci import function as header
from avmm.pci.function import Bar, Function, Identity
from avmm.pci.root import RootComplex
from fakes.pci_host import ECAM, HIGH, LOW, Cpu

MEMORY = header.COMMAND_MEMORY


class Scratch:
    """A BAR's region that remembers what is written."""

    def __init__(self) -> None:
        self.written: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        return 0x1000 + offset

    def write(self, offset: int, size: int, value: int) -> Deferred | None:
        self.written.append((offset, size, value))
        return None


@pytest.fixture
def cpu() -> Iterator[Cpu]:
    root = RootComplex(ECAM, (LOW, HIGH))
    yield Cpu(root)
    root.close()


def plugged(cpu: Cpu, device: int = 1, size_bytes: int = 0x10000) -> tuple[Function, Bar]:
    function = Function(Identity(0x1AF4, 0x1042, 0x01_8000, 1, 0x1AF4, 0x1042))
    bar = function.add_bar(size_bytes, Scratch())
    cpu.root.add(device, function)
    return function, bar


@pytest.mark.spec("4.1.1", "meet the PCI specification")
def test_the_header_says_what_it_is(cpu: Cpu) -> None:
    plugged(cpu)
    space = cpu.config(1)
    assert cpu.read(space, 4) == 0x1042_1AF4
    assert cpu.read(space + header.REVISION_ID, 4) == 0x0180_0001
    assert cpu.read(space + header.SUBSYSTEM_VENDOR_ID, 4) == 0x1042_1AF4
    assert cpu.read(space + 0x0E, 1) == 0  # a plain function
    assert cpu.read(space + header.INTERRUPT_LINE + 1, 1) == 0  # no INTx
    assert cpu.exits == 0


def test_device_0_is_the_host_bridge(cpu: Cpu) -> None:
    assert cpu.read(cpu.config(0) + header.CLASS_CODE, 2) == 0x0000
    assert cpu.read(cpu.config(0) + header.CLASS_CODE + 2, 1) == 0x06


@pytest.mark.spec("4.1.1", "meet the PCI specification")
async def test_what_is_not_there_reads_as_ones(cpu: Cpu) -> None:
    plugged(cpu)
    for gpa in (cpu.config(2), cpu.config(1) + 0x1000, cpu.config(1) + 0x100, ECAM + 0xF_FFFC):
        assert cpu.read(gpa, 4) == 0xFFFF_FFFF
        await cpu.write(gpa, 4, 0)


@pytest.mark.spec("4.1.1", "meet the PCI specification")
async def test_a_bar_tells_its_size_without_an_exit(cpu: Cpu) -> None:
    plugged(cpu)
    at = cpu.config(1) + header.BAR0
    before = cpu.read(at, 8)
    assert before == LOW.gpa | 0b100  # 64-bit memory, where firmware put it
    await cpu.write(at, 4, 0xFFFF_FFFF)
    await cpu.write(at + 4, 4, 0xFFFF_FFFF)
    assert cpu.read(at, 8) == 0xFFFF_FFFF_FFFF_0004
    await cpu.write(at, 8, before)
    await cpu.write(at + 8, 4, 0xFFFF_FFFF)
    assert cpu.read(at + 8, 4) == 0, "no such BAR"
    assert cpu.exits == 0


@pytest.mark.spec("4.1.1", "meet the PCI specification")
async def test_a_bar_answers_while_memory_is_decoded(cpu: Cpu) -> None:
    _, bar = plugged(cpu)
    moves: list[int | None] = []
    bar.on_move.append(lambda: moves.append(bar.gpa))
    command = cpu.config(1) + header.COMMAND
    assert cpu.read(LOW.gpa + 8, 4) == 0xFFFF_FFFF
    await cpu.write(command, 2, MEMORY)
    assert cpu.read(LOW.gpa + 8, 4) == 0x1008
    await cpu.write(command, 2, 4 | MEMORY)  # bus master: of no consequence
    await cpu.write(command, 2, 4)
    assert cpu.read(LOW.gpa + 8, 4) == 0xFFFF_FFFF
    assert moves == [LOW.gpa, None]


@pytest.mark.spec("4.1.1", "meet the PCI specification")
async def test_a_bar_moves_while_it_answers(cpu: Cpu) -> None:
    _, bar = plugged(cpu)
    space = cpu.config(1)
    await cpu.write(space + header.COMMAND, 2, MEMORY)
    await cpu.write(space + header.BAR0, 8, HIGH.gpa + 0x30000)
    assert bar.gpa == HIGH.gpa + 0x30000
    assert cpu.read(HIGH.gpa + 0x30004, 4) == 0x1004
    assert cpu.read(LOW.gpa + 4, 4) == 0xFFFF_FFFF


@pytest.mark.parametrize("gpa", [0, 0xFEE0_0000, LOW.gpa + LOW.size_bytes, 2**64 - 0x10000])
async def test_a_bar_outside_the_windows_answers_nowhere(cpu: Cpu, gpa: int) -> None:
    _, bar = plugged(cpu)
    await cpu.write(cpu.config(1) + header.COMMAND, 2, MEMORY)
    await cpu.write(cpu.config(1) + header.BAR0, 8, gpa)
    assert bar.gpa is None
    await cpu.write(cpu.config(1) + header.BAR0, 8, LOW.gpa)
    assert bar.gpa == LOW.gpa


async def test_an_access_across_the_end_of_a_bar_is_nobodys(cpu: Cpu) -> None:
    _, bar = plugged(cpu)
    await cpu.write(cpu.config(1) + header.COMMAND, 2, MEMORY)
    assert cpu.read(LOW.gpa + 0xFFFE, 4) == 0xFFFF_FFFF
    await cpu.write(LOW.gpa + 0xFFFE, 4, 0)
    assert isinstance(bar.region, Scratch)
    assert bar.region.written == []


def test_bars_have_places_of_their_own_by_their_size(cpu: Cpu) -> None:
    plugged(cpu, 1, 0x1000)
    plugged(cpu, 2, 0x10000)
    plugged(cpu, 31, 0x1000)
    bases = [cpu.read(cpu.config(d) + header.BAR0, 8) & ~0xF for d in (1, 2, 31)]
    assert bases == [LOW.gpa, LOW.gpa + 0x10000, LOW.gpa + 0x20000]


def test_a_device_number_is_given_once(cpu: Cpu) -> None:
    plugged(cpu)
    for device in (0, 1, 32):
        function = Function(Identity(1, 2, 3))
        with pytest.raises(BugError, match="taken or does not exist"):
            cpu.root.add(device, function)
        function.close()


@pytest.mark.spec("4.1.1", "meet the PCI specification")
async def test_capabilities_are_a_list_and_writable_where_they_say(cpu: Cpu) -> None:
    function, _ = plugged(cpu)
    first = function.add_capability(0x09, b"\x05abc")
    second = function.add_capability(0x11, b"\xff\xff", b"\x0f")
    space = cpu.config(1)
    assert cpu.read(space + header.STATUS, 2) & 1 << 4
    assert cpu.read(space + header.CAPABILITIES_POINTER, 1) == first == 0x40
    assert cpu.read(space + first, 2) == second << 8 | 0x09
    assert cpu.read(space + second, 2) == 0x0011
    await cpu.write(space + second + 2, 2, 0)
    assert cpu.read(space + second + 2, 2) == 0xFFF0
    assert list(function.capabilities) == [first, second]


def test_a_capability_that_has_no_room_is_a_bug(cpu: Cpu) -> None:
    function, _ = plugged(cpu)
    with pytest.raises(BugError, match="no room"):
        function.add_capability(0x09, bytes(0xC0))
