"""The 16550 as Linux's 8250 driver uses it, the guest's side played through the native calls."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from avmm.legacy.serial16550 import Serial16550
from avmm.native import lib

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)
RDI, THRI = 1, 2
DR, THRE = 0x01, 0x20
RTS, LOOP = 0x02, 0x10


@dataclass
class Guest:
    """Registers from a vCPU's side, and the interrupt line's edges."""

    serial: Serial16550
    irq_fd: int
    received: bytearray = field(default_factory=bytearray)

    def read(self, register: int) -> int:
        return lib.av_uart_read(self.serial.native, register)

    def write(self, register: int, value: int) -> int:
        return lib.av_uart_write(self.serial.native, register, value)

    def edge(self) -> bool:
        try:
            return os.eventfd_read(self.irq_fd) > 0
        except BlockingIOError:
            return False

    def handle_interrupt(self) -> None:
        """As an 8250 driver does: until IIR says that nothing is pending."""
        while not (iir := self.read(IIR)) & 1:
            if iir & 0x0F == 0x04:
                while self.read(LSR) & DR:
                    self.received.append(self.read(DATA))


@pytest.fixture
def guest() -> Iterator[Guest]:
    irq_fd = os.eventfd(0, os.EFD_NONBLOCK)
    serial = Serial16550(irq_fd)
    yield Guest(serial, irq_fd)
    serial.close()
    os.close(irq_fd)


def signalled(fd: int) -> bool:
    try:
        return os.eventfd_read(fd) > 0
    except BlockingIOError:
        return False


def test_what_the_guest_sends_is_taken_whole_and_wakes_the_loop_once(guest: Guest) -> None:
    for byte in b"hello":
        assert guest.write(DATA, byte) == 0
    assert os.eventfd_read(guest.serial.event_fd) == 1
    assert guest.serial.take() == b"hello"
    assert guest.serial.take() == b""


def test_a_full_transmit_ring_refuses_the_byte_and_takes_it_later(guest: Guest) -> None:
    for _ in range(65536):
        assert guest.write(DATA, 0x61) == 0
    assert guest.write(DATA, 0x62) == 1
    assert guest.serial.take() == b"a" * 65536
    assert guest.write(DATA, 0x62) == 0
    assert guest.serial.take() == b"b"
    assert guest.serial.statistics().tx_full == 1


def test_enabling_the_transmit_interrupt_interrupts_at_once(guest: Guest) -> None:
    guest.write(IER, THRI)
    assert guest.edge()
    assert guest.read(IIR) & 0x0F == 0x02
    assert guest.read(IIR) & 0x0F == 0x01
    assert not guest.edge()
    guest.write(DATA, 0x61)
    assert guest.edge()


def test_received_bytes_interrupt_and_are_read_in_order(guest: Guest) -> None:
    guest.write(IER, RDI)
    assert not guest.edge()
    assert guest.serial.put(b"abc") == 3
    assert guest.edge()
    guest.handle_interrupt()
    assert guest.received == b"abc"
    assert guest.read(LSR) == THRE | 0x40


def test_bytes_that_came_before_the_interrupt_was_enabled_interrupt_then(guest: Guest) -> None:
    guest.serial.put(b"x")
    assert not guest.edge()
    guest.write(IER, RDI)
    assert guest.edge()


def test_the_driver_finds_a_16550a(guest: Guest) -> None:
    guest.write(SCR, 0x5A)
    assert guest.read(SCR) == 0x5A
    assert guest.read(IIR) >> 6 == 0
    guest.write(IIR, 1)
    assert guest.read(IIR) >> 6 == 3
    guest.write(LCR, 0x80)
    guest.write(DATA, 12)
    guest.write(IER, 1)
    assert (guest.read(DATA), guest.read(IER)) == (12, 1)
    guest.write(LCR, 3)
    assert guest.read(IER) == 0


def test_loopback_connects_both_ends_and_the_modem_lines(guest: Guest) -> None:
    assert guest.read(MSR) == 0xB0
    guest.write(MCR, LOOP | 0x0A)
    assert guest.read(MSR) & 0xF0 == 0x90
    guest.write(DATA, 0x77)
    assert guest.read(DATA) == 0x77
    assert guest.serial.take() == b""


def test_a_guest_that_lowers_rts_gets_nothing_until_it_raises_it(guest: Guest) -> None:
    guest.write(IER, RDI)
    guest.write(MCR, RTS)
    guest.write(MCR, 0)
    guest.serial.put(b"x")
    assert not guest.edge()
    assert not guest.read(LSR) & DR
    guest.write(MCR, RTS)
    assert guest.edge()
    guest.handle_interrupt()
    assert guest.received == b"x"


def test_a_mebibyte_arrives_whole_through_interrupts(guest: Guest) -> None:
    data = random.Random(1).randbytes(1 << 20)
    rest = memoryview(data)
    guest.write(IER, RDI)
    while len(guest.received) < len(data):
        rest = rest[guest.serial.put(rest) :]
        assert guest.edge(), "bytes are left, and no interrupt says so"
        guest.handle_interrupt()
        assert signalled(guest.serial.event_fd) or not rest
    assert bytes(guest.received) == data


@pytest.mark.parametrize("seed", range(20))
def test_no_edge_is_ever_lost(seed: int) -> None:
    """Whatever both sides do: when a condition is enabled and pending, an edge has come since the
    guest last saw it end. A console hangs for ever otherwise."""
    irq_fd = os.eventfd(0, os.EFD_NONBLOCK)
    serial = Serial16550(irq_fd)
    guest = Guest(serial, irq_fd)
    rng = random.Random(seed)
    sent = bytearray()

    def host_sends() -> None:
        data = rng.randbytes(rng.randint(1, 700))
        sent.extend(data[: serial.put(data)])

    def guest_writes() -> None:
        guest.write(DATA, 0x61)

    def guest_enables() -> None:
        guest.write(IER, rng.randint(0, 3))

    def loop_turn() -> None:
        serial.take()
        serial.put(b"")

    steps = (host_sends, guest_writes, guest_enables, loop_turn)
    for _ in range(500):
        rng.choice(steps)()
        if guest.edge():
            guest.handle_interrupt()
        if guest.read(IER) & RDI:
            assert not guest.read(LSR) & DR
    guest.write(IER, RDI)
    while len(guest.received) < len(sent):
        loop_turn()
        assert guest.edge()
        guest.handle_interrupt()
    assert guest.received == sent
    serial.close()
    os.close(irq_fd)
