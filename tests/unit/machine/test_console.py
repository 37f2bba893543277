"""The serial console over a real UART; the guest's side is played through the native calls."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable

import pytest

from avmm.errors import HostError
from avmm.kicks import Kicks
from avmm.legacy.serial16550 import Serial16550
from avmm.machine.console import SerialConsole
from avmm.native import lib
from fakes.mmio_driver import settle

DATA, LSR = 0, 5
RING_BYTES = 65536


class Port:
    """A console, and the guest at the other end of it."""

    def __init__(self, irq_fd: int) -> None:
        self.serial = Serial16550(irq_fd)
        self.line = SerialConsole(self.serial)
        self.console = self.line.console
        self.line.start()

    def guest_writes(self, data: bytes) -> int:
        """As much as fits; how much."""
        for index, byte in enumerate(data):
            if lib.av_uart_write(self.serial.native, DATA, byte) != 0:
                return index
        return len(data)

    def guest_reads(self) -> bytes:
        """What is there now."""
        found = bytearray()
        while lib.av_uart_read(self.serial.native, LSR) & 1:
            found.append(lib.av_uart_read(self.serial.native, DATA))
        return bytes(found)


@pytest.fixture
async def port() -> AsyncIterator[Port]:
    irq_fd = os.eventfd(0, os.EFD_NONBLOCK)
    port = Port(irq_fd)
    yield port
    port.line.close()
    port.serial.close()
    os.close(irq_fd)


async def test_several_readers_each_get_everything(port: Port) -> None:
    readers = [asyncio.create_task(port.console.open()[0].read()) for _ in range(3)]
    for piece in (b"one ", b"two ", b"three"):
        assert port.guest_writes(piece) == len(piece)
        await settle()
    port.line.close()
    assert await asyncio.gather(*readers) == [b"one two three"] * 3


async def test_a_long_write_waits_for_the_guest_and_arrives_whole(port: Port) -> None:
    data = bytes(range(256)) * 1000
    _, writer = port.console.open()
    writer.write(data)
    draining = asyncio.create_task(writer.drain())
    received = bytearray()
    while len(received) < len(data):
        received += port.guest_reads()
        assert not draining.done() or len(data) - len(received) <= RING_BYTES
        await asyncio.sleep(0)
    await draining
    assert received == data


async def test_bytes_of_one_write_stay_together(port: Port) -> None:
    writes = [asyncio.create_task(port.console.write(letter * 50_000)) for letter in (b"a", b"b")]
    received = bytearray()
    while len(received) < 100_000:
        received += port.guest_reads()
        await asyncio.sleep(0)
    await asyncio.gather(*writes)
    assert received == b"a" * 50_000 + b"b" * 50_000


async def test_a_reader_that_holds_fills_the_ring_and_then_the_vcpu_waits(port: Port) -> None:
    reader, _ = port.console.open(hold=True, limit=1000)
    sent = 0
    while count := port.guest_writes(b"x" * 5000):
        sent += count
        await settle()
    waiting = port.line.make_room()
    assert waiting is not None
    assert sent >= RING_BYTES
    room = asyncio.ensure_future(waiting)
    await settle()
    assert not room.done()
    await reader.readexactly(sent)
    await room
    assert port.line.make_room() is None
    assert port.guest_writes(b"more") == 4
    assert await reader.readexactly(4) == b"more"


async def test_input_reaches_a_guest_whose_output_is_held(port: Port) -> None:
    reader, writer = port.console.open(hold=True, limit=10)
    port.guest_writes(b"y" * 100)
    await settle()
    assert port.console.held
    writer.write(b"typed")
    await writer.drain()
    assert port.guest_reads() == b"typed"
    assert await reader.readexactly(100) == b"y" * 100


async def test_the_end_of_the_guest_gives_a_reader_all_that_was_held(port: Port) -> None:
    reader, _ = port.console.open(hold=True, limit=10)
    for _ in range(5):
        port.guest_writes(b"z" * 100)
        await settle()
    port.line.close()
    assert await reader.read() == b"z" * 500


def judge_by(rest_s: float) -> Callable[[Kicks, bool], float]:
    return lambda kicks, worked: 0.0 if worked else rest_s


async def test_a_guest_that_prints_by_the_byte_is_drained_now_and_then(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Kicks, "judge", judge_by(1e6))
    reader, _ = port.console.open()
    port.guest_writes(b"a")
    assert await reader.readexactly(1) == b"a"
    port.guest_writes(b"b")
    await settle()
    assert port.console.scrollback == b"a"
    port.line.close()
    assert await reader.read() == b"b"


async def test_what_came_meanwhile_is_taken_afterwards(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Kicks, "judge", judge_by(1e-6))
    reader, _ = port.console.open()
    for byte in b"a", b"b", b"c":
        port.guest_writes(byte)
        assert await reader.readexactly(1) == byte


async def test_a_guest_that_prints_much_or_reads_is_listened_to(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Kicks, "judge", judge_by(1e6))
    reader, writer = port.console.open()
    port.guest_writes(bytes(4096))
    assert await reader.readexactly(4096) == bytes(4096)
    writer.write(bytes(512))
    await writer.drain()
    await settle()
    port.guest_reads()
    await settle()
    port.guest_writes(bytes(4096))
    assert await reader.readexactly(4096) == bytes(4096)


async def test_without_room_for_a_watch_output_comes_all_the_same(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise HostError("watch", op="epoll_ctl", errno=28)

    monkeypatch.setattr(Kicks, "judge", judge_by(1e-6))
    reader, _ = port.console.open()
    monkeypatch.setattr("avmm.machine.console.add_reader", refuse)
    for byte in b"a", b"b", b"c":
        port.guest_writes(byte)
        assert await reader.readexactly(1) == byte
