"""MSI-X: a table of messages, one a vector (PCI Local Bus 3.0 section 6.8.2)."""

from __future__ import annotations

import contextlib
import errno
import os
import select
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from avmm.bus.region import Call
from avmm.bus.registers import Registers
from avmm.errors import HostError
from avmm.eventfd import new_eventfd
from avmm.pci.function import Bar, Function

CAPABILITY_ID = 0x11
VECTORS_MAX = 2048
ENTRY_BYTES = 16

ENTRY_DATA = 8
ENTRY_CONTROL = 12
ENTRY_MASKED = 1

CONTROL_ENABLE = 1 << 15
CONTROL_MASK_ALL = 1 << 14

_MESSAGE_BYTES = 12
_ADDRESS_WRITABLE = 0xFFFF_FFFF_FFFF_FFFC
_INTERRUPT_ADDRESS, _INTERRUPT_ADDRESS_MASK = 0xFEE0_0000, 0xFFFF_FFFF_FFF0_0000


class Messages(Protocol):
    """The host's side of message-signalled interrupts: kvm.routes.MsiRoutes, or a test's."""

    def new_gsi(self) -> int:
        """An interrupt that goes nowhere yet."""
        ...

    def route(self, gsi: int, address: int, data: int) -> None:
        """Make it the message `data` at `address`."""
        ...

    def connect(self, event_fd: int, gsi: int) -> None:
        """Each write to the eventfd sends it."""
        ...

    def disconnect(self, event_fd: int, gsi: int) -> None:
        """Writes wait in the eventfd."""
        ...


@dataclass(slots=True)
class _Vector:
    fd: int
    gsi: int
    connected: bool = False


class Msix:
    """The capability, table and pending bits of one function, and an eventfd for each vector.

    A write to a vector's eventfd is an interrupt of the guest. While the vector is masked, or all
    are, its eventfd is disconnected from KVM and what is written stays in it: that is its pending
    bit, and connecting it again delivers.

    The C loop keeps the table, and what is written there while it has no effect; the rest comes
    to read_table() and write_table(), on vCPU threads, as the Bar's region forwards it. Made,
    changed and closed on the loop. Raises HostError("descriptors") when made with more vectors
    than the process may have open files.

    on_enable: called when MSI-X was switched on or off.
    on_refused: called for a message that is no interrupt; its vector sends nothing.
    """

    def __init__(
        self,
        function: Function,
        bar: Bar,
        messages: Messages,
        *,
        vectors: int,
        table_offset: int,
        pba_offset: int,
    ) -> None:
        self.table = Registers(vectors * ENTRY_BYTES)
        self.enabled = False
        self.on_enable: Callable[[], None] = lambda: None
        self.on_refused: Callable[[], None] = lambda: None
        self._function = function
        self._bar = bar
        self._messages = messages
        self._table_offset = table_offset
        self._masked_all = False
        self._vectors: list[_Vector] = []
        try:
            for _ in range(vectors):
                self._vectors.append(_Vector(new_eventfd(), messages.new_gsi()))
        except BaseException:
            self.close()
            raise
        for index in range(vectors):
            at = index * ENTRY_BYTES
            self.table.define(at, 8, 0, writable=_ADDRESS_WRITABLE)
            self.table.define(at + ENTRY_DATA, 4, 0, writable=0xFFFF_FFFF)
            self.table.define(at + ENTRY_CONTROL, 4, ENTRY_MASKED, writable=ENTRY_MASKED)
        which_bar = function.bars.index(bar) * 2
        body = (vectors - 1).to_bytes(2, "little")
        body += (table_offset | which_bar).to_bytes(4, "little")
        body += (pba_offset | which_bar).to_bytes(4, "little")
        control = CONTROL_ENABLE | CONTROL_MASK_ALL
        at = function.add_capability(CAPABILITY_ID, body, control.to_bytes(2, "little"))
        self._control = at + 2
        function.registers.watch(self._control, 2, control)
        function.on_control.append(self._settle)
        bar.on_move.append(self._move)

    def __len__(self) -> int:
        return len(self._vectors)

    def fd(self, vector: int) -> int:
        """The eventfd that raises a vector; open as long as this object."""
        return self._vectors[vector].fd

    def read_table(self, offset: int, size: int) -> int:
        """The driver reads the table."""
        return self.table.get(offset, size)

    def write_table(self, offset: int, size: int, value: int) -> Call:
        """The driver writes the table; any size, also across entries."""
        return Call(lambda: self._written(offset, size, value))

    def read_pending(self, offset: int, size: int) -> int:
        """The driver reads the pending bit array."""
        bits = 0
        for bit in range(8 * size):
            index = 8 * offset + bit
            if index < len(self._vectors) and self._pending(self._vectors[index]):
                bits |= 1 << bit
        return bits

    def close(self) -> None:
        """Give back the eventfds; nobody may raise and no vCPU run any more. Idempotent."""
        for vector in self._vectors:
            os.close(vector.fd)
        self._vectors.clear()
        self.table.close()

    def _pending(self, vector: _Vector) -> bool:
        if vector.connected:
            return False
        poll = select.poll()
        poll.register(vector.fd, select.POLLIN)
        return bool(poll.poll(0))

    def _move(self) -> None:
        gpa = self._bar.gpa
        self.table.move(None if gpa is None else gpa + self._table_offset)

    def _settle(self) -> None:
        """Follow the capability's control word."""
        control = self._function.registers.get(self._control, 2)
        enabled, masked = bool(control & CONTROL_ENABLE), bool(control & CONTROL_MASK_ALL)
        if (enabled, masked) == (self.enabled, self._masked_all):
            return
        switched = enabled != self.enabled
        self.enabled, self._masked_all = enabled, masked
        for index in range(len(self._vectors)):
            self._settle_vector(index)
        if switched:
            self.on_enable()

    def _written(self, offset: int, size: int, value: int) -> None:
        self.table.put(offset, size, value)
        first, last = offset // ENTRY_BYTES, (offset + size - 1) // ENTRY_BYTES
        for index in range(first, min(last + 1, len(self._vectors))):
            self._settle_vector(index)

    def _settle_vector(self, index: int) -> None:
        """Connect a vector that is on and unmasked, to the message in its entry."""
        vector, at = self._vectors[index], index * ENTRY_BYTES
        active = self.enabled and not self._masked_all
        self.table.watch(at + ENTRY_CONTROL, 4, ENTRY_MASKED if active else 0)
        unmasked = active and not self.table.get(at + ENTRY_CONTROL, 4) & ENTRY_MASKED
        # An unmasked entry may not be changed (6.8.2.9); who does it all the same is followed.
        for word in range(0, _MESSAGE_BYTES, 4):
            self.table.watch(at + word, 4, 0xFFFF_FFFF if unmasked else 0)
        if not unmasked:
            self._disconnect(vector)
            return
        address, data = self.table.get(at, 8), self.table.get(at + ENTRY_DATA, 4)
        if self._route(vector, address, data):
            self._connect(vector)
        else:
            self._disconnect(vector)
            self.on_refused()

    def _route(self, vector: _Vector, address: int, data: int) -> bool:
        if address & _INTERRUPT_ADDRESS_MASK != _INTERRUPT_ADDRESS:
            return False
        try:
            self._messages.route(vector.gsi, address, data)
        except HostError as e:
            if e.errno != errno.EINVAL:
                raise
            return False  # a message KVM does not know how to send is the guest's mistake
        return True

    def _connect(self, vector: _Vector) -> None:
        if vector.connected:
            return
        # KVM also looks for what is already there, but some versions leave it there, and it would
        # pass for a pending interrupt the next time the vector is masked.
        pending = False
        with contextlib.suppress(BlockingIOError):
            pending = os.eventfd_read(vector.fd) > 0
        self._messages.connect(vector.fd, vector.gsi)
        vector.connected = True
        if pending:
            os.eventfd_write(vector.fd, 1)

    def _disconnect(self, vector: _Vector) -> None:
        if vector.connected:
            self._messages.disconnect(vector.fd, vector.gsi)
            vector.connected = False
