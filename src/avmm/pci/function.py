"""A PCI function: its configuration header, capabilities and base address registers.

PCI Local Bus Specification 3.0, chapter 6. Type 0 headers, 256 bytes, 64-bit memory BARs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from avmm.bus.region import Call, Deferred, Region
from avmm.bus.registers import Registers
from avmm.errors import BugError

CONFIG_BYTES = 256

VENDOR_ID = 0x00
DEVICE_ID = 0x02
COMMAND = 0x04
STATUS = 0x06
REVISION_ID = 0x08
CLASS_CODE = 0x09
CACHE_LINE_SIZE = 0x0C
BAR0 = 0x10
SUBSYSTEM_VENDOR_ID = 0x2C
SUBSYSTEM_ID = 0x2E
CAPABILITIES_POINTER = 0x34
INTERRUPT_LINE = 0x3C

COMMAND_MEMORY = 1 << 1
_COMMAND_PLAIN = 1 << 2 | 1 << 6 | 1 << 8 | 1 << 10
"""Bus master, parity, SERR#, interrupt disable: kept for the driver, of no consequence here."""
STATUS_INTERRUPT = 1 << 3
_STATUS_CAPABILITIES = 1 << 4
_BAR_64_BIT_MEMORY = 0b100
_BAR_ADDRESS = 0xFFFF_FFFF_FFFF_FFF0
_FIRST_CAPABILITY = 0x40


@dataclass(frozen=True, slots=True)
class Identity:
    """What a driver recognizes the function by. class_code: 24 bits."""

    vendor_id: int
    device_id: int
    class_code: int
    revision: int = 0
    subsystem_vendor_id: int = 0
    subsystem_id: int = 0


@dataclass(slots=True)
class Bar:
    """A range of memory whose address the driver chooses. gpa: where it answers now, None while
    it does not. on_move: called on the loop after each change of gpa."""

    offset: int
    size_bytes: int
    region: Region
    gpa: int | None = None
    on_move: list[Callable[[], None]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Window:
    """Configuration bytes that are a region of their own."""

    offset: int
    size: int
    region: Region


class Function:
    """One function, a bus Region of 256 bytes for the accesses that are not answered in C.

    Made on the loop; then read() and write() on vCPU threads.

    decodes: whether an address range is forwarded to the function by what is above it.
    on_map: called on the loop when a BAR came, went or moved.
    after_write: called on the vCPU's thread when a write's consequences on the loop are there; may
    block, and find that another vCPU's write came in between.
    on_control: called on the loop after a write that changed watched bits of a capability.
    """

    def __init__(self, identity: Identity) -> None:
        self.registers = Registers(CONFIG_BYTES)
        self.bars: list[Bar] = []
        self.decodes: Callable[[int, int], bool] = lambda gpa, size_bytes: True
        self.on_map: Callable[[], None] = lambda: None
        self.on_control: list[Callable[[], None]] = []
        self.after_write: Callable[[], None] = lambda: None
        self._windows: list[_Window] = []
        self._interrupting: Callable[[], bool] | None = None
        self._capabilities: list[int] = []
        self._next = _FIRST_CAPABILITY
        define = self.registers.define
        define(VENDOR_ID, 2, identity.vendor_id)
        define(DEVICE_ID, 2, identity.device_id)
        define(COMMAND, 2, 0, writable=_COMMAND_PLAIN)
        define(REVISION_ID, 1, identity.revision)
        define(CLASS_CODE, 3, identity.class_code)
        define(CACHE_LINE_SIZE, 1, 0, writable=0xFF)
        define(SUBSYSTEM_VENDOR_ID, 2, identity.subsystem_vendor_id)
        define(SUBSYSTEM_ID, 2, identity.subsystem_id)
        define(INTERRUPT_LINE, 1, 0, writable=0xFF)  # the pin is 0: no INTx

    @property
    def capabilities(self) -> Sequence[int]:
        """Where each capability begins, in the order of the list."""
        return self._capabilities

    def add_capability(self, kind: int, body: bytes, writable: bytes = b"") -> int:
        """Append one; body: what follows the id and the next pointer. Its offset.

        writable: the bits of the body's first bytes that a driver can write.
        """
        at = self._next
        if at + 2 + len(body) > CONFIG_BYTES:
            raise BugError("pci-capability", f"Capability {kind:#x} at {at:#x} has no room")
        define = self.registers.define
        define(at, 2, kind)
        for index, byte in enumerate(body):
            mask = writable[index] if index < len(writable) else 0
            define(at + 2 + index, 1, byte, writable=mask)
        define(self._capabilities[-1] + 1 if self._capabilities else CAPABILITIES_POINTER, 1, at)
        define(STATUS, 2, _STATUS_CAPABILITIES)
        self._capabilities.append(at)
        self._next = at + 2 + len(body) + 3 & ~3
        return at

    def add_bar(self, size_bytes: int, region: Region) -> Bar:
        """Append a 64-bit memory BAR; size_bytes: a power of two from 16 on."""
        bar = Bar(BAR0 + 8 * len(self.bars), size_bytes, region)
        self.bars.append(bar)
        mask = -size_bytes & _BAR_ADDRESS
        self.registers.define(bar.offset, 8, _BAR_64_BIT_MEMORY, writable=mask)
        self.registers.define(COMMAND, 2, 0, writable=_COMMAND_PLAIN | COMMAND_MEMORY)
        self.registers.watch(COMMAND, 2, COMMAND_MEMORY)
        return bar

    def add_window(self, offset: int, size: int, region: Region) -> None:
        """Answer these configuration bytes by `region`, at every access."""
        self.registers.hand_over(offset, size, reads=True)
        self._windows.append(_Window(offset, size, region))

    def show_interrupts(self, interrupting: Callable[[], bool] | None) -> None:
        """Let Interrupt Status be what `interrupting` says, whenever a vCPU reads it; None: 0,
        which costs no exit. Loop."""
        self._interrupting = interrupting
        self.registers.hand_over(STATUS, 1, reads=interrupting is not None)

    def read(self, offset: int, size: int) -> int:
        """An access to a window, or one that touches it and reads what is beside it; the status."""
        if window := self._window(offset, size):
            return window.region.read(offset - window.offset, size)
        value = self.registers.get(offset, size)
        interrupting = self._interrupting
        if offset <= STATUS < offset + size and interrupting is not None and interrupting():
            value |= STATUS_INTERRUPT << 8 * (STATUS - offset)
        return value

    def write(self, offset: int, size: int, value: int) -> Deferred | None:
        """A write with consequences: the vCPU waits until they are there."""
        if window := self._window(offset, size):
            return window.region.write(offset - window.offset, size, value)
        return Call(lambda: self._written(offset, size, value), self.after_write)

    def close(self) -> None:
        """Free it; no vCPU may run any more. Idempotent."""
        self.registers.close()

    def _window(self, offset: int, size: int) -> _Window | None:
        for window in self._windows:
            if window.offset <= offset and offset + size <= window.offset + window.size:
                return window
        return None

    def _written(self, offset: int, size: int, value: int) -> None:
        self.registers.put(offset, size, value)
        self._map()
        for call in self.on_control:
            call()

    def _map(self) -> None:
        """Let the BARs be where the registers say."""
        decoding = bool(self.registers.get(COMMAND, 2) & COMMAND_MEMORY)
        moved = []
        for bar in self.bars:
            # While nothing is decoded, addresses are written, sizes found out, without an exit.
            self.registers.watch(bar.offset, 8, _BAR_ADDRESS if decoding else 0)
            gpa = self.registers.get(bar.offset, 8) & _BAR_ADDRESS
            at = gpa if decoding and self.decodes(gpa, bar.size_bytes) else None
            if at != bar.gpa:
                bar.gpa = at
                moved.append(bar)
        if moved:
            self.on_map()
        for bar in moved:
            for call in bar.on_move:
                call()
