"""A front-end's memory table: what is mapped, and what is refused."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator

import pytest

from avmm.errors import GuestFault, HostError
from avmm.native import ffi, lib
from avmm.units import MIB
from avmm.vhost_user.memory import FrontEndMemory
from avmm.vhost_user.message import MemoryTable, TableRegion

PAGE = 4096


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, MIB)
    yield fd
    os.close(fd)


@pytest.fixture
def memory() -> Iterator[FrontEndMemory]:
    memory = FrontEndMemory()
    yield memory
    memory.close()


def table(*regions: tuple[int, int, int, int]) -> MemoryTable:
    return MemoryTable(tuple(TableRegion(*region) for region in regions))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_guest_memory_is_the_front_ends(memory: FrontEndMemory, memfd: int) -> None:
    memory.replace(
        table((0, PAGE, 0x7000_0000, 0), (MIB, 2 * PAGE, 0x9000_0000, PAGE)), [memfd, memfd]
    )
    os.pwrite(memfd, b"low", 10)
    os.pwrite(memfd, b"high", PAGE + 20)
    assert memory.read(10, 3) == b"low"
    assert memory.read(MIB + 20, 4) == b"high"
    memory.write(MIB, b"back")
    assert os.pread(memfd, 4, PAGE) == b"back"
    hva = lib.av_gmem_hva(memory.native, MIB + 20, 4)
    assert bytes(ffi.buffer(hva, 4)) == b"high"
    with pytest.raises(GuestFault, match="No 1 bytes"):
        memory.read(PAGE, 1)


def test_addresses_of_the_front_end_become_guest_physical(
    memory: FrontEndMemory, memfd: int
) -> None:
    memory.replace(table((MIB, PAGE, 0x7000_0000, 0)), [memfd])
    assert memory.gpa_of(0x7000_0010) == MIB + 0x10
    for uva in (0x6FFF_FFFF, 0x7000_0000 + PAGE, 0, (1 << 64) - 1):
        with pytest.raises(GuestFault, match="in no region"):
            memory.gpa_of(uva)


def test_an_offset_inside_of_a_page_is_no_hindrance(memory: FrontEndMemory, memfd: int) -> None:
    os.pwrite(memfd, b"here", PAGE + 512)
    memory.replace(table((0, 1024, 0x7000_0000, PAGE + 512)), [memfd])
    assert memory.read(0, 4) == b"here"


def test_a_new_table_takes_the_place_of_the_old(memory: FrontEndMemory, memfd: int) -> None:
    before = descriptors()
    memory.replace(table((0, PAGE, 0x7000_0000, 0)), [memfd])
    memory.replace(table((MIB, PAGE, 0x9000_0000, 0)), [memfd])
    assert memory.ranges == ((MIB, PAGE),)
    with pytest.raises(GuestFault):
        memory.gpa_of(0x7000_0000)
    memory.close()
    assert memory.native.count == 0
    assert not lib.av_gmem_hva(memory.native, MIB, 1)
    assert descriptors() == before


TOP = 1 << 64


@pytest.mark.parametrize(
    "regions",
    [
        [(0, 0, 0, 0)],
        [(0, 2 * MIB, 0, 0)],
        [(0, PAGE, 0, MIB)],
        [(0, 1, 0, MIB)],
        [(0, PAGE, 0, TOP - PAGE)],
        [(TOP - PAGE, 2 * PAGE, 0, 0)],
        [(0, 2 * PAGE, TOP - PAGE, 0)],
        [(0, TOP - 1, 0, 0)],
        [(0, PAGE, 0, 0), (0, PAGE, MIB, PAGE)],
        [(0, 2 * PAGE, 0, 0), (PAGE, PAGE, MIB, 0)],
        [(0, PAGE, 0, 0), (MIB, PAGE, 100, PAGE)],
    ],
)
def test_absurd_tables_are_refused_and_leave_nothing(
    memory: FrontEndMemory, memfd: int, regions: list[tuple[int, int, int, int]]
) -> None:
    before = descriptors()
    with pytest.raises(GuestFault) as refused:
        memory.replace(table(*regions), [memfd] * len(regions))
    assert refused.value.kind == "front-end"
    assert memory.native.count == 0
    assert descriptors() == before


def test_a_region_that_cannot_be_mapped_takes_the_others_with_it(
    memory: FrontEndMemory, memfd: int
) -> None:
    read_only = os.open(f"/proc/self/fd/{memfd}", os.O_RDONLY)
    before = descriptors()
    with pytest.raises(HostError, match="front-end's memory"):
        memory.replace(table((0, PAGE, 0, 0), (MIB, PAGE, MIB, PAGE)), [memfd, read_only])
    assert descriptors() == before
    os.close(read_only)


def test_what_is_no_file_is_refused(memory: FrontEndMemory) -> None:
    fd = os.open("/dev/zero", os.O_RDWR)
    with pytest.raises(GuestFault, match="not a file"):
        memory.replace(table((0, PAGE, 0, 0)), [fd])
    os.close(fd)


def test_seals_can_be_required(memfd: int) -> None:
    memory = FrontEndMemory(require_seals=True)
    with pytest.raises(GuestFault, match="not sealed"):
        memory.replace(table((0, PAGE, 0, 0)), [memfd])
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    memory.replace(table((0, PAGE, 0, 0)), [memfd])
    with pytest.raises(PermissionError):
        os.ftruncate(memfd, 0)
    memory.close()
