"""The console over a real UART; the guest's side is played through the native calls."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator

import pytest

from avmm.errors import HostError
from avmm.legacy.serial16550 import Serial16550
from avmm.machine.console import Console
from avmm.native import lib

DATA, LSR = 0, 5


class Port:
    """A console, and the guest at the other end of it."""

    def __init__(self, irq_fd: int, scrollback_bytes: int) -> None:
        self.serial = Serial16550(irq_fd)
        self.console = Console(self.serial, scrollback_bytes)
        self.console.start()

    def guest_writes(self, data: bytes) -> None:
        for byte in data:
            assert lib.av_uart_write(self.serial.native, DATA, byte) == 0

    def guest_reads(self) -> bytes:
        """What is there now."""
        found = bytearray()
        while lib.av_uart_read(self.serial.native, LSR) & 1:
            found.append(lib.av_uart_read(self.serial.native, DATA))
        return bytes(found)


@pytest.fixture
async def port() -> AsyncIterator[Port]:
    irq_fd = os.eventfd(0, os.EFD_NONBLOCK)
    port = Port(irq_fd, 1000)
    yield port
    port.console.close()
    port.serial.close()
    os.close(irq_fd)


async def test_expect_matches_across_chunks_and_goes_on_behind_the_match(port: Port) -> None:
    port.guest_writes(b"boot: lo")
    waiting = asyncio.create_task(port.console.expect(rb"log(\w)n:"))
    await port.console.read(0)
    assert not waiting.done()
    port.guest_writes(b"gin: ok ok")
    match = await waiting
    assert (match[0], match[1]) == (b"login:", b"i")
    await port.console.expect(b"ok")
    await port.console.expect(re.compile(b"ok"))
    with pytest.raises(TimeoutError, match="the console ends with b'boot: login: ok ok'"):
        await port.console.expect(b"ok", timeout=0)


async def test_a_match_outlives_the_scrollback(port: Port) -> None:
    port.guest_writes(b"needle")
    match = await port.console.expect(b"needle")
    port.guest_writes(b"x" * 3000)
    await port.console.read(6)
    assert match[0] == b"needle"
    assert port.console.end == 3006


async def test_the_scrollback_keeps_the_last_bytes_and_positions_go_on(port: Port) -> None:
    port.guest_writes(bytes(range(256)) * 10)
    data, end = await port.console.read(0)
    assert end == 2560
    assert data == (bytes(range(256)) * 10)[-1000:]
    assert port.console.scrollback == data


async def test_several_readers_each_get_everything(port: Port) -> None:
    async def reader() -> bytes:
        position, text = 0, b""
        while True:
            data, position = await port.console.read(position)
            if not data:
                return text
            text += data

    readers = [asyncio.create_task(reader()) for _ in range(3)]
    for piece in (b"one ", b"two ", b"three"):
        before = port.console.end
        port.guest_writes(piece)
        await port.console.read(before)
        await asyncio.sleep(0)
    port.console.close()
    assert await asyncio.gather(*readers) == [b"one two three"] * 3


async def test_sinks_get_each_chunk_until_they_are_removed(port: Port) -> None:
    chunks: list[bytes] = []
    port.console.add_sink(chunks.append)
    port.guest_writes(b"seen")
    await port.console.read(0)
    port.console.remove_sink(chunks.append)
    port.guest_writes(b"unseen")
    await port.console.read(4)
    assert b"".join(chunks) == b"seen"


async def test_a_long_write_waits_for_the_guest_and_arrives_whole(port: Port) -> None:
    data = bytes(range(256)) * 1000
    writing = asyncio.create_task(port.console.write(data))
    received = bytearray()
    while len(received) < len(data):
        received += port.guest_reads()
        assert not writing.done() or len(data) - len(received) <= 65536
        await asyncio.sleep(0)
    await writing
    assert received == data


async def test_bytes_of_one_write_stay_together(port: Port) -> None:
    writes = [asyncio.create_task(port.console.write(letter * 50_000)) for letter in (b"a", b"b")]
    received = bytearray()
    while len(received) < 100_000:
        received += port.guest_reads()
        await asyncio.sleep(0)
    await asyncio.gather(*writes)
    assert received == b"a" * 50_000 + b"b" * 50_000


async def test_the_end_of_the_guest_ends_what_waits(port: Port) -> None:
    expecting = asyncio.create_task(port.console.expect(b"never"))
    writing = asyncio.create_task(port.console.write(bytes(200_000)))
    await asyncio.sleep(0)
    port.guest_writes(b"last words")
    port.console.close()
    with pytest.raises(HostError, match="last words"):
        await expecting
    with pytest.raises(HostError, match="ended"):
        await writing
    with pytest.raises(HostError, match="ended"):
        port.console.write_nowait(b"x")
    assert await port.console.read(port.console.end) == (b"", port.console.end)
    assert port.console.scrollback == b"last words"
