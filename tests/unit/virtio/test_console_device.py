"""virtio-console over the real ring, from the registers to asyncio's streams (virtio 1.3, 5.3)."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest

from avmm.errors import ConfigError
from avmm.virtio import features
from avmm.virtio.devices.console import RX, TX, ConsoleDevice, VirtioConsole, build
from avmm.virtio.interrupt import CONFIG_CHANGE
from fakes.driver_queue import Segment
from fakes.mmio_driver import settle
from fakes.pci_driver import pci_rig
from fakes.virtio_rig import DATA_GPA, virtio_rig

Rigged = Callable[[], AbstractAsyncContextManager[Any]]


@pytest.fixture(params=[virtio_rig, pci_rig], ids=["mmio", "pci"])
def rigged(request: pytest.FixtureRequest) -> Rigged:
    @asynccontextmanager
    async def made() -> AsyncIterator[Any]:
        rig = request.param
        async with rig(lambda c: build(VirtioConsole(scrollback="4K"), c)) as running:
            await running.driver.start()
            yield running

    return made


def say(rig: Any, *pieces: bytes, at: int = DATA_GPA) -> None:
    """The guest writes one chain of these pieces."""
    segments = []
    for piece in pieces:
        rig.memory.write(at, piece)
        segments.append(Segment(at, len(piece)))
        at += len(piece)
    rig.driver.queues[TX].offer(*segments)
    rig.driver.kick(TX)


def offer(rig: Any, size_bytes: int, at: int = DATA_GPA) -> int:
    head: int = rig.driver.queues[RX].offer(Segment(at, size_bytes, writable=True))
    rig.driver.kick(RX)
    return head


async def test_what_the_guest_writes_is_read(rigged: Rigged) -> None:
    async with rigged() as rig:
        reader, _ = rig.device.console.open()
        say(rig, b"log", b"in", b": ")
        assert await reader.readexactly(7) == b"login: "
        assert await rig.driver.used(TX) == [(0, 0)]


async def test_what_is_written_fills_the_guests_buffers(rigged: Rigged) -> None:
    async with rigged() as rig:
        _, writer = rig.device.console.open()
        writer.write(b"hello, guest")
        draining = asyncio.create_task(writer.drain())
        first = offer(rig, 5)
        assert await rig.driver.used(RX) == [(first, 5)]
        assert not draining.done()
        second = offer(rig, 100, DATA_GPA + 5)
        assert await rig.driver.used(RX) == [(second, 7)]
        await draining
        assert rig.memory.read(DATA_GPA, 12) == b"hello, guest"


async def test_a_guest_never_waits_for_readers(rigged: Rigged) -> None:
    async with rigged() as rig:
        reader, _ = rig.device.console.open(limit=1000)
        for index in range(40):
            say(rig, b"%04d" % index * 256)
            await rig.driver.used(TX)
        rig.device.console.close()
        got = await reader.read()
        assert got.endswith(b"0039" * 256)
        assert reader.lost_bytes == 40 * 1024 - len(got) > 0


async def test_a_long_chain_is_taken_in_pieces(rigged: Rigged) -> None:
    async with rigged() as rig:
        data = bytes(range(256)) * 800  # 200 KiB
        reader, _ = rig.device.console.open()
        reading = asyncio.create_task(reader.readexactly(len(data)))
        await settle()
        say(rig, data[:70_000], data[70_000:])
        assert await reading == data
        assert len(await rig.driver.used(TX)) == 1


async def test_the_size_is_in_the_configuration_space(rigged: Rigged) -> None:
    async with rigged() as rig:
        assert rig.device.config.data[:4] == bytes(4)
        rig.device.console.resize(120, 40)
        assert await rig.driver.interrupted() & CONFIG_CHANGE
        assert struct.unpack("<HH", rig.device.config.data[:4]) == (120, 40)


async def test_a_driver_that_came_after_the_size_is_told_when_it_writes(rigged: Rigged) -> None:
    async with rigged() as rig:
        rig.device.console.resize(120, 40)
        await rig.driver.interrupted()
        await rig.driver.start()
        say(rig, b"hello")
        while not await rig.driver.interrupted() & CONFIG_CHANGE:
            pass


async def test_an_emergency_write_needs_no_queue() -> None:
    async with virtio_rig(lambda c: build(VirtioConsole(), c)) as rig:
        assert rig.device.state.offered & features.CONSOLE_EMERG_WRITE
        for byte in b"panic":
            rig.device.write_config(8, bytes([byte, 0, 0, 0]))
        rig.device.write_config(0, b"\xff\xff")
        assert rig.device.console.scrollback == b"panic"
        assert rig.device.ignored == 1


async def test_input_waits_while_the_device_rests_and_for_a_driver(rigged: Rigged) -> None:
    async with rigged() as rig:
        await rig.device.quiesce()
        _, writer = rig.device.console.open()
        writer.write(b"typed")
        head = offer(rig, 100)
        await settle()
        assert rig.driver.queues[RX].take_used() == []
        await rig.device.resume()
        assert await rig.driver.used(RX) == [(head, 5)]
        await rig.driver.start()
        writer.write(b"again")
        head = offer(rig, 100)
        assert await rig.driver.used(RX) == [(head, 5)]


@pytest.mark.parametrize("queue", [RX, TX])
async def test_a_buffer_of_the_wrong_direction_is_a_fault(rigged: Rigged, queue: int) -> None:
    async with rigged() as rig:
        rig.driver.queues[queue].offer(Segment(DATA_GPA, 16, writable=queue == TX))
        rig.driver.kick(queue)
        _, writer = rig.device.console.open()
        writer.write(b"x")
        await rig.driver.interrupted()
        assert rig.device.statistics().last_fault == "request"
        await rig.driver.start()
        say(rig, b"and on")
        await rig.device.console.expect(b"and on")


async def test_a_broken_ring_is_a_fault_of_the_guest_and_not_of_the_writer(rigged: Rigged) -> None:
    async with rigged() as rig:
        rig.driver.queues[RX].offer_broken()
        _, writer = rig.device.console.open()
        writer.write(b"x")
        assert rig.device.statistics().faults == 1
        assert rig.errors == []


async def test_many_small_chains_come_in_turns(rigged: Rigged) -> None:
    async with rigged() as rig:
        for index in range(64):
            say(rig, bytes([65 + index % 26]), at=DATA_GPA + index)
        assert len(await rig.driver.used(TX, 64)) == 64
        assert rig.device.console.end == 64


async def test_what_was_left_in_the_queue_is_read_after_the_guests_end() -> None:
    async with virtio_rig(lambda c: build(VirtioConsole(), c)) as rig:
        await rig.driver.start()
        reader, _ = rig.device.console.open()
        device: ConsoleDevice = rig.device
        await device.quiesce()
        say(rig, b"last words")
    assert await reader.read() == b"last words"
    assert device.console.closed


def test_a_scrollback_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="console: scrollback"):
        VirtioConsole(scrollback=0)
