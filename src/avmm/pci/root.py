"""The PCI root complex: bus 0, its configuration space and its memory windows.

Configuration space is memory-mapped (ECAM, PCI Express Base 5.0 section 7.2.2) and behind ports
0xCF8 and 0xCFC. The C loop finds the function and answers; what is left comes here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from avmm.bus.region import Deferred
from avmm.errors import BugError
from avmm.pci.function import Bar, Function, Identity
from avmm.units import Gpa, align_up

DEVICES = 32
_DEVICE_SHIFT = 15
_FUNCTION_BYTES = 4096

_HOST_BRIDGE = Identity(vendor_id=0x1B36, device_id=0x0008, class_code=0x06_0000)
"""The generic host bridge of PCI Express machines without a chipset."""


@dataclass(frozen=True, slots=True)
class MemoryWindow:
    """Guest physical memory that is forwarded to bus 0."""

    gpa: Gpa
    size_bytes: int

    def holds(self, gpa: int, size_bytes: int) -> bool:
        """Whether all of a range lies in it."""
        return self.gpa <= gpa and gpa + size_bytes <= self.gpa + self.size_bytes


class RootComplex:
    """Bus 0 with the host bridge as device 0; every function is number 0 of its device.

    Made and filled on the loop, before vCPUs run. A bus Region at the ECAM's address: read() and
    write() come from vCPU threads.

    windows: BARs answer in them only; the first is where they are at the start.
    """

    def __init__(self, ecam: Gpa, windows: Sequence[MemoryWindow]) -> None:
        self.windows = tuple(windows)
        self.functions: dict[int, Function] = {}
        self._ecam = ecam
        self._free_gpa: int = self.windows[0].gpa
        self._mapped: tuple[Bar, ...] = ()
        self.add(0, Function(_HOST_BRIDGE))

    def add(self, device: int, function: Function) -> None:
        """Put it on the bus, its BARs at addresses of their own, as firmware leaves them."""
        if device in self.functions or device >= DEVICES:
            raise BugError("pci-device", f"Device {device} of bus 0 is taken or does not exist")
        self.functions[device] = function
        function.decodes = self._decodes
        function.on_map = self._remap
        function.registers.move(self._ecam + (device << _DEVICE_SHIFT))
        for bar in function.bars:
            gpa = align_up(self._free_gpa, bar.size_bytes)
            self._free_gpa = gpa + bar.size_bytes
            if not self._decodes(gpa, bar.size_bytes):
                raise BugError("pci-window", f"Device {device}: the memory window is full")
            function.registers.put(bar.offset, 8, gpa)

    def read(self, offset: int, size: int) -> int:
        """Configuration space; functions that are not there read as ones."""
        function = self._function(offset)
        return -1 if function is None else function.read(offset % _FUNCTION_BYTES, size)

    def write(self, offset: int, size: int, value: int) -> Deferred | None:
        """Likewise; nothing is written then."""
        function = self._function(offset)
        return None if function is None else function.write(offset % _FUNCTION_BYTES, size, value)

    def memory(self, window: MemoryWindow) -> WindowRegion:
        """The bus Region of one of the windows."""
        return WindowRegion(self, window)

    def find(self, gpa: int, size: int) -> tuple[Bar, int] | None:
        """The BAR that holds all of an access, and the offset in it. Any thread."""
        for bar in self._mapped:
            at = bar.gpa
            if at is not None and at <= gpa and gpa + size <= at + bar.size_bytes:
                return bar, gpa - at
        return None

    def close(self) -> None:
        """Free the functions; no vCPU may run any more. Idempotent."""
        for function in self.functions.values():
            function.close()

    def _function(self, offset: int) -> Function | None:
        device, rest = divmod(offset, 1 << _DEVICE_SHIFT)
        return self.functions.get(device) if rest < _FUNCTION_BYTES else None

    def _decodes(self, gpa: int, size_bytes: int) -> bool:
        return any(window.holds(gpa, size_bytes) for window in self.windows)

    def _remap(self) -> None:
        self._mapped = tuple(
            bar
            for function in self.functions.values()
            for bar in function.bars
            if bar.gpa is not None
        )


class WindowRegion:
    """A memory window as a bus Region: finds the BAR that an access is for."""

    def __init__(self, root: RootComplex, window: MemoryWindow) -> None:
        self._root = root
        self._gpa = window.gpa

    def read(self, offset: int, size: int) -> int:
        """Ones where no BAR is."""
        found = self._root.find(self._gpa + offset, size)
        return -1 if found is None else found[0].region.read(found[1], size)

    def write(self, offset: int, size: int, value: int) -> Deferred | None:
        """Nothing where no BAR is."""
        found = self._root.find(self._gpa + offset, size)
        return None if found is None else found[0].region.write(found[1], size, value)
