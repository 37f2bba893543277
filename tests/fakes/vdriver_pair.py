"""Both ends of a queue in one process: the C driver, and the native ring."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from avmm.bench.front_end import F_VERSION_1, RingPlace
from avmm.mem.guest import GuestMemory
from avmm.native import CData, ffi, lib
from avmm.units import MIB
from fakes.blk_back_end import DeviceRing

DATA_GPA = 1 * MIB
DATA_BYTES = 1 * MIB


@dataclass
class Pair:
    """Both ends of one queue in one process."""

    memory: GuestMemory
    driver: CData
    device: DeviceRing
    kick_fd: int

    def add(self, token: int, *segments: tuple[int, int], readable: int) -> bool:
        native = ffi.new("struct av_vdriver_segment[]", list(segments))
        added = lib.av_vdriver_add(self.driver, native, readable, len(segments) - readable, token)
        return bool(added)

    def take(self) -> tuple[int, int] | None:
        token, written = ffi.new("uint32_t *"), ffi.new("uint32_t *")
        taken = lib.av_vdriver_take(self.driver, token, written)
        assert taken >= 0
        return (token[0], written[0]) if taken else None

    def statistics(self) -> CData:
        out = ffi.new("struct av_vdriver_stats *")
        lib.av_vdriver_statistics(self.driver, out)
        return out


def setup_of(memory: GuestMemory, size: int, features: int) -> CData:
    place = RingPlace.at(0x1000, size)
    setup = ffi.new("struct av_vdriver_setup *")
    setup.mem = memory.native
    setup.desc_gpa, setup.driver_gpa = place.desc_gpa, place.driver_gpa
    setup.device_gpa, setup.table_gpa = place.device_gpa, place.table_gpa
    setup.features, setup.size = features | F_VERSION_1, size
    setup.kick_fd = setup.call_fd = -1
    return setup


@contextlib.contextmanager
def pair(features: int, size: int = 8) -> Iterator[Pair]:
    with contextlib.ExitStack() as stack:
        memory = GuestMemory.create(4 * MIB)
        stack.callback(memory.close)
        setup = setup_of(memory, size, features)
        for name in ("kick_fd", "call_fd"):
            fd = os.eventfd(0, os.EFD_CLOEXEC)
            stack.callback(os.close, fd)
            setattr(setup, name, fd)
        error = ffi.new("int *")
        driver = lib.av_vdriver_create(setup, error)
        assert error[0] == 0
        stack.callback(lib.av_vdriver_destroy, driver)
        device = DeviceRing(memory, setup)
        stack.callback(device.close)
        yield Pair(memory, driver, device, setup.kick_fd)
