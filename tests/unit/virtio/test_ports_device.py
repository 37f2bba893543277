"""virtio-console with ports, from the registers to asyncio's streams (virtio 1.3, 5.3)."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest

from avmm.errors import ConfigError, HostError
from avmm.log import LINES_AT_ONCE
from avmm.virtio.byte_queue import TAKE_BYTES
from avmm.virtio.devices.ports import CONTROL_RX, Ports, build
from avmm.virtio.devices.ports_control import Event, Message, pack, parse
from fakes.driver_queue import Segment
from fakes.mmio_driver import settle
from fakes.pci_driver import pci_rig
from fakes.ports_guest import MESSAGES_GPA, RX, TX, PortsGuest
from fakes.virtio_rig import DATA_GPA, virtio_rig

Started = Callable[..., AbstractAsyncContextManager[PortsGuest]]


@pytest.fixture(params=[virtio_rig, pci_rig], ids=["mmio", "pci"])
def started(request: pytest.FixtureRequest) -> Started:
    @asynccontextmanager
    async def made(*names: str, ready: bool = True) -> AsyncIterator[PortsGuest]:
        ports = Ports(list(names) or ["logs"])
        async with request.param(lambda context: build(ports, context)) as rig:
            guest = PortsGuest(rig)
            await guest.start()
            if ready:
                await guest.is_ready()
            yield guest

    return made


async def test_the_driver_learns_of_ports_and_their_names(started: Started) -> None:
    async with started("logs", "org.test.0", ready=False) as guest:
        assert struct.unpack("<I", guest.device.config.data[4:8]) == (3,)
        await guest.says(0, Event.DEVICE_READY, 1)
        assert await guest.hears(2) == [pack(1, Event.DEVICE_ADD, 0), pack(2, Event.DEVICE_ADD, 0)]
        await guest.says(2, Event.PORT_READY, 1)
        assert await guest.hears() == [pack(2, Event.PORT_NAME, 1, b"org.test.0")]
        await guest.says(0, Event.DEVICE_READY, 1)  # once is enough
        await settle()
        assert guest.heard() == []


async def test_both_sides_open_and_bytes_flow(started: Started) -> None:
    async with started() as guest:
        port = guest.device.ports["logs"]
        opening = asyncio.create_task(port.open())
        assert await guest.hears() == [pack(1, Event.PORT_OPEN, 1)]
        assert not opening.done()
        await guest.says(1, Event.PORT_OPEN, 1)
        reader, writer = await opening
        guest.writes(b"to the host")
        assert await reader.readexactly(11) == b"to the host"
        head = guest.offers(100)
        writer.write(b"to the guest")
        await writer.drain()
        assert (await guest.rig.driver.used(RX)) == [(head, 12)]
        assert guest.rig.memory.read(DATA_GPA, 12) == b"to the guest"
        statistics = port.statistics()
        assert (statistics.tx_bytes, statistics.rx_bytes) == (11, 12)


async def opened(guest: PortsGuest, **options: Any) -> tuple[Any, Any]:
    await guest.says(1, Event.PORT_OPEN, 1)
    pair = await guest.device.ports["logs"].open(**options)
    await guest.hears()
    return pair


async def test_a_guest_that_is_not_read_waits_and_loses_nothing(started: Started) -> None:
    async with started() as guest:
        reader, _ = await opened(guest, limit=1000)
        queue = guest.rig.driver.queues[TX]
        given, taken = 0, 0
        for _ in range(queue.size):
            guest.writes(b"%06d" % given * 500, at=DATA_GPA + 3000 * given)
            given += 1
            await settle()
            taken += len(queue.take_used())
        assert taken < given
        got = await reader.readexactly(3000 * given)
        assert got == b"".join(b"%06d" % index * 500 for index in range(given))
        while taken < given:
            taken += len(await guest.rig.driver.used(TX))


async def test_a_writer_waits_for_the_guests_buffers(started: Started) -> None:
    async with started() as guest:
        _, writer = await opened(guest)
        writer.write(bytes(10_000))
        draining = asyncio.create_task(writer.drain())
        for _ in range(2):
            guest.offers(4096)
            assert [written for _, written in await guest.rig.driver.used(RX)] == [4096]
            assert not draining.done()
        guest.offers(4096)
        await draining


async def test_nothing_is_sent_before_the_guest_has_it_open(started: Started) -> None:
    async with started() as guest:
        opening = asyncio.create_task(guest.device.ports["logs"].open())
        await guest.hears()
        guest.offers(100)
        guest.writes(b"too early")
        await settle()
        assert guest.rig.driver.queues[TX].take_used() == []
        opening.cancel()
        await asyncio.wait([opening])
        assert await guest.hears() == [pack(1, Event.PORT_OPEN, 0)]


async def test_the_guests_close_is_the_end_behind_all_that_it_wrote(started: Started) -> None:
    async with started() as guest:
        reader, writer = await opened(guest, limit=10)
        for index in range(10):
            guest.writes(b"%d" % index * 100, at=DATA_GPA + 100 * index)
        writer.write(b"never taken")
        await guest.says(1, Event.PORT_OPEN, 0)
        assert await reader.read() == b"".join(b"%d" % index * 100 for index in range(10))
        with pytest.raises(ConnectionResetError):
            await writer.drain()
        assert await guest.hears() == [pack(1, Event.PORT_OPEN, 0)]
        reader, _ = await opened(guest)
        guest.writes(b"a new one")
        assert await reader.readexactly(9) == b"a new one"


async def test_closing_the_writer_closes_the_port(started: Started) -> None:
    async with started() as guest:
        reader, writer = await opened(guest)
        with pytest.raises(ConfigError, match="open already"):
            await guest.device.ports["logs"].open()
        writer.close()
        await writer.wait_closed()
        assert await guest.hears() == [pack(1, Event.PORT_OPEN, 0)]
        assert await reader.read() == b""
        assert not guest.device.ports["logs"].host_open
        await opened(guest)


async def test_ports_do_not_wait_for_one_another(started: Started) -> None:
    async with started("logs", "data") as guest:
        await opened(guest, limit=10)
        await guest.says(2, Event.PORT_OPEN, 1)
        reader, _ = await guest.device.ports["data"].open()
        for _ in range(20):
            guest.writes(b"x" * 1000)
        guest.writes(b"not held", queue=7, at=DATA_GPA + 5000)
        assert await reader.readexactly(8) == b"not held"


async def test_a_reset_ends_streams_and_open_waits_for_the_next_driver(started: Started) -> None:
    async with started() as guest:
        reader, _ = await opened(guest)
        await guest.start()
        assert await reader.read() == b""
        opening = asyncio.create_task(guest.device.ports["logs"].open())
        await settle()
        await guest.start()
        await guest.is_ready()
        await guest.says(1, Event.PORT_OPEN, 1)
        reader, _ = await opening
        guest.writes(b"again")
        assert await reader.readexactly(5) == b"again"


async def test_the_guests_end_ends_streams_and_those_who_wait() -> None:
    async with virtio_rig(lambda c: build(Ports(["logs", "data"]), c)) as rig:
        guest = PortsGuest(rig)
        await guest.start()
        await guest.is_ready()
        reader, _ = await opened(guest)
        waiting = asyncio.create_task(rig.device.ports["data"].open())
        await guest.hears()
        await rig.device.quiesce()
        guest.writes(b"last words")
    assert await reader.read() == b"last words"
    with pytest.raises(HostError, match="ended"):
        await waiting
    with pytest.raises(HostError, match="ended"):
        await rig.device.ports["logs"].open()


@pytest.mark.parametrize(
    "data",
    [
        b"\x01",
        struct.pack("<IHH", 0, 99, 1),
        struct.pack("<IHH", 7, Event.PORT_OPEN, 1),
        struct.pack("<IHH", 0, Event.PORT_OPEN, 1),
        struct.pack("<IHH", 0xFFFF_FFFF, Event.PORT_READY, 1),
        struct.pack("<IHH", 1, Event.DEVICE_ADD, 1),
        struct.pack("<IHH", 1, Event.RESIZE, 1),
        bytes(5000),
    ],
    ids=["short", "unknown", "no port", "port 0", "far", "not a driver's", "resize", "long"],
)
async def test_messages_that_mean_nothing_are_counted(started: Started, data: bytes) -> None:
    async with started() as guest:
        before = guest.device.counters()
        await guest.sends(data)
        after = guest.device.counters()
        assert after["control_errors"] - before["control_errors"] == 1
        assert after["control_messages"] - before["control_messages"] == 1
        assert guest.device.statistics().faults == 0
        await opened(guest)


async def test_messages_before_the_port_was_added_mean_nothing(started: Started) -> None:
    async with started(ready=False) as guest:
        await guest.says(1, Event.PORT_OPEN, 1)
        await guest.says(1, Event.PORT_READY, 1)
        assert guest.device.counters()["control_errors"] == 2
        assert not guest.device.ports["logs"].guest_open


async def test_a_driver_that_complains_for_ever_does_not_fill_the_log(
    started: Started, caplog: pytest.LogCaptureFixture
) -> None:
    async with started() as guest:
        for _ in range(50):
            await guest.says(1, Event.PORT_READY, 0)
            await guest.says(0, Event.DEVICE_READY, 0)
        assert len(caplog.records) == LINES_AT_ONCE
        assert guest.rig.device.context.guest_log.left_out == 100 - LINES_AT_ONCE


async def test_a_driver_that_takes_no_messages_makes_none_pile_up(started: Started) -> None:
    async with started(ready=False) as guest:
        await guest.start(messages=0)
        await guest.says(0, Event.DEVICE_READY, 1)
        for _ in range(100):
            await guest.says(1, Event.PORT_READY, 1)
        assert len(guest.device._pending) == 2


async def test_a_control_buffer_too_small_for_a_message_is_a_fault(started: Started) -> None:
    async with started(ready=False) as guest:
        await guest.start(messages=0)
        guest.rig.driver.queues[CONTROL_RX].offer(Segment(MESSAGES_GPA, 4, writable=True))
        await guest.says(0, Event.DEVICE_READY, 1)
        assert guest.device.statistics().last_fault == "request"


async def test_a_chain_that_shrinks_while_it_is_read_ends_there(started: Started) -> None:
    async with started() as guest:
        reader, _ = await opened(guest, limit=1000)
        queue = guest.rig.driver.queues[TX]
        guest.writes(b"x" * 200_000)
        await settle()
        first = await reader.read(1 << 20)
        assert len(first) <= 128 * 1024
        queue.memory.write(queue.desc_gpa + 8, struct.pack("<I", 10))  # the length, of 10 bytes now
        guest.writes(b"behind it", at=DATA_GPA + 0x40000)
        total = len(first) + len(await reader.readuntil(b"behind it")) - len(b"behind it")
        assert total < 200_000
        assert total % TAKE_BYTES == 0
        assert guest.device.statistics().faults == 0


@pytest.mark.parametrize(
    "names", [[], ["a", "a"], ["a b"], [""], ["-a"], ["x" * 64], [str(i) for i in range(31)]]
)
def test_names_that_cannot_be_are_refused(names: list[str]) -> None:
    with pytest.raises(ConfigError, match="ports: "):
        Ports(names)


def test_only_a_drivers_messages_are_parsed() -> None:
    assert parse(pack(3, Event.PORT_OPEN, 1)) == Message(3, Event.PORT_OPEN, 1)
    assert parse(pack(3, Event.PORT_OPEN, 1) + b"more") == Message(3, Event.PORT_OPEN, 1)
    for event in (Event.DEVICE_ADD, Event.DEVICE_REMOVE, Event.CONSOLE_PORT, Event.PORT_NAME):
        assert parse(pack(3, event, 1)) is None
