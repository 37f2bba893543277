"""The host's side of PCI without KVM, and a CPU that reaches the bus as vCPUs do."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field

from avmm.bus.registers import Registers
from avmm.errors import HostError
from avmm.native import ffi, lib
from avmm.pci.root import MemoryWindow, RootComplex
from avmm.units import MIB, Gpa
from fakes.mmio_driver import perform

ECAM = Gpa(0xE000_0000)
LOW = MemoryWindow(Gpa(0xC000_0000), 16 * MIB)
HIGH = MemoryWindow(Gpa(0x1_0000_0000), 64 * MIB)


@dataclass
class FakeMessages:
    """In the place of MsiRoutes: remembers. connected: gsi by eventfd; refuse: an errno, or 0."""

    routes: dict[int, tuple[int, int]] = field(default_factory=dict)
    connected: dict[int, int] = field(default_factory=dict)
    gsis: int = 24
    refuse: int = 0

    def new_gsi(self) -> int:
        self.gsis += 1
        return self.gsis - 1

    def route(self, gsi: int, address: int, data: int) -> None:
        if self.refuse:
            raise HostError("ioctl", op="KVM_SET_GSI_ROUTING", errno=self.refuse)
        self.routes[gsi] = (address, data)

    def connect(self, event_fd: int, gsi: int) -> None:
        assert event_fd not in self.connected
        self.connected[event_fd] = gsi

    def disconnect(self, event_fd: int, gsi: int) -> None:
        assert self.connected.pop(event_fd) == gsi

    def sent(self, event_fd: int) -> tuple[int, int] | None:
        """Take what a connected eventfd was written: the message it stands for."""
        gsi = self.connected.get(event_fd)
        try:
            return None if gsi is None or not os.eventfd_read(event_fd) else self.routes[gsi]
        except BlockingIOError:
            return None


class FakeNotifications:
    """KVM's ioeventfds: eventfd by address; a second one at an address is refused, as there."""

    def __init__(self) -> None:
        self.at: dict[int, int] = {}

    def ioeventfd(self, event_fd: int, gpa: int, size_bytes: int, value: int | None) -> None:
        if gpa in self.at:
            raise HostError("ioctl", op="KVM_IOEVENTFD", errno=errno.EEXIST)
        self.at[gpa] = event_fd

    def remove_ioeventfd(self, event_fd: int, gpa: int, size_bytes: int, value: int | None) -> None:
        assert self.at.pop(gpa) == event_fd


class Cpu:
    """A vCPU's accesses: answered by Registers as the C loop does it, else by the bus.

    exits: how many were not answered by Registers.
    """

    def __init__(self, root: RootComplex) -> None:
        self.root = root
        self.registers: list[Registers] = []
        self.exits = 0

    def read(self, gpa: int, size: int) -> int:
        for native, offset in self._blocks(gpa):
            data = ffi.new("uint8_t[8]")
            if lib.av_regs_read(native, offset, size, data):
                return int.from_bytes(ffi.buffer(data, size)[:], "little")
            break
        self.exits += 1
        ones = (1 << 8 * size) - 1
        if ECAM <= gpa < ECAM + MIB:
            return self.root.read(gpa - ECAM, size) & ones
        for window in self.root.windows:
            if window.holds(gpa, size):
                return self.root.memory(window).read(gpa - window.gpa, size) & ones
        return ones

    async def write(self, gpa: int, size: int, value: int) -> None:
        value &= (1 << 8 * size) - 1
        for native, offset in self._blocks(gpa):
            if lib.av_regs_write(native, offset, size, value.to_bytes(size, "little")):
                return
            break
        self.exits += 1
        if ECAM <= gpa < ECAM + MIB:
            await perform(self.root.write(gpa - ECAM, size, value))
            return
        for window in self.root.windows:
            if window.holds(gpa, size):
                await perform(self.root.memory(window).write(gpa - window.gpa, size, value))

    def config(self, device: int) -> int:
        """Where a device's configuration space is."""
        return ECAM + (device << 15)

    def _blocks(self, gpa: int) -> list[tuple[object, int]]:
        offset = ffi.new("uint32_t *")
        spaces = [function.registers for function in self.root.functions.values()]
        return [
            (registers.native, int(offset[0]))
            for registers in (*spaces, *self.registers)
            if lib.av_regs_at(registers.native, gpa, offset)
        ]
