"""Where interrupts go: KVM's table of global system interrupts."""

from __future__ import annotations

from avmm.kvm import abi
from avmm.kvm.vm import Vm

_PIC_PINS = 8


class MsiRoutes:
    """The routing table of one VM with an in-kernel interrupt controller: its pins, as KVM sets
    them up, and message-signalled interrupts behind them. Loop.

    pins: of the IOAPIC; the first 16 interrupts reach the two PICs too.
    """

    def __init__(self, vm: Vm, pins: int) -> None:
        self._vm = vm
        self._pins = [_pin(gsi, abi.IRQCHIP_IOAPIC, gsi) for gsi in range(pins)]
        self._pins += [_pin(gsi, abi.IRQCHIP_PIC_MASTER, gsi) for gsi in range(_PIC_PINS)]
        self._pins += [
            _pin(_PIC_PINS + pin, abi.IRQCHIP_PIC_SLAVE, pin) for pin in range(_PIC_PINS)
        ]
        self._next_gsi = pins
        self._messages: dict[int, tuple[int, int]] = {}

    def new_gsi(self) -> int:
        """One more interrupt, which goes nowhere before route()."""
        gsi = self._next_gsi
        self._next_gsi += 1
        return gsi

    def route(self, gsi: int, address: int, data: int) -> None:
        """Make `gsi` the message `data` at `address`."""
        if self._messages.get(gsi) == (address, data):
            return
        messages = {**self._messages, gsi: (address, data)}
        entries = [_message(*item) for item in messages.items()]
        self._vm.set_gsi_routing(self._pins + entries)
        self._messages = messages

    def connect(self, event_fd: int, gsi: int) -> None:
        """Each write to `event_fd` is one message of `gsi`."""
        self._vm.irqfd(event_fd, gsi)

    def disconnect(self, event_fd: int, gsi: int) -> None:
        """Undo connect(): what is written from now on waits in `event_fd`."""
        self._vm.remove_irqfd(event_fd, gsi)


def _pin(gsi: int, irqchip: int, pin: int) -> bytes:
    return abi.IRQ_ROUTING_PIN.pack(gsi, abi.IRQ_ROUTING_IRQCHIP, 0, 0, irqchip, pin)


def _message(gsi: int, message: tuple[int, int]) -> bytes:
    address, data = message
    low, high = address & 0xFFFF_FFFF, address >> 32
    return abi.IRQ_ROUTING_MSI.pack(gsi, abi.IRQ_ROUTING_MSI_TYPE, 0, 0, low, high, data, 0)
