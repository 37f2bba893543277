"""What a guest, or a program, cannot have more of, and what comes of one that does not go on."""

from __future__ import annotations

import asyncio

import pytest

from avmm.errors import HostError
from avmm.log import GuestLog
from avmm.vsock.host import VsockHost
from avmm.vsock.packet import CID_HOST, TYPE_STREAM, Header, Op
from avmm.vsock.table import Table
from avmm.vsock.transport import StreamTransport
from fakes.mmio_driver import settle
from fakes.virtio_rig import virtio_rig
from fakes.vsock_guest import VsockGuest, vsock_guest


def host_of_its_own() -> VsockHost:
    loop = asyncio.get_running_loop()
    return VsockHost(Table(3, loop, lambda: None), loop, GuestLog())


PORT, SERVED = 1024, 5000
MANY = 3000


class Taker:
    """A ring that takes all, and counts what it took."""

    def __init__(self) -> None:
        self.headers: list[Header] = []

    def put(self, header: Header, data: memoryview) -> int:
        self.headers.append(header)
        return len(data)

    def put_header(self, header: Header) -> bool:
        self.headers.append(header)
        return True


async def connected(guest: VsockGuest) -> asyncio.StreamWriter:
    """A stream to the guest."""
    connecting = asyncio.ensure_future(guest.host.connect(PORT))
    await guest.accept()
    _, writer = await connecting
    return writer


async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def test_connections_beyond_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avmm.vsock.table.CONNECTIONS_MAX", 2)
    async with vsock_guest(virtio_rig) as guest, await guest.host.serve(SERVED, wait):
        for port in (1, 2, 3):
            guest.send(Op.REQUEST, SERVED, port)
        answers = {}
        for _ in range(3):
            header, _ = await guest.packet()
            answers[header.dst_port] = header.op
        assert answers == {1: Op.RESPONSE, 2: Op.RESPONSE, 3: Op.RST}
        with pytest.raises(HostError, match="connections; close some"):
            await guest.host.connect(PORT)
        guest.send(Op.RST, SERVED, 1)
        guest.send(Op.REQUEST, SERVED, 3)
        await guest.expect(Op.RESPONSE)
        for port in (2, 3):
            guest.send(Op.RST, SERVED, port)


async def test_thousands_of_connections_at_once() -> None:
    received: list[bytes] = []
    done = asyncio.Event()

    class Program(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            received.append(data)

        def eof_received(self) -> bool:
            return False  # and so it closes

        def connection_lost(self, error: Exception | None) -> None:
            lost.append(error)
            if len(lost) == MANY:
                done.set()

    lost: list[Exception | None] = []
    host, ring = host_of_its_own(), Taker()
    server = host.create_server(Program, SERVED)

    def packets(op: Op, payload: bytes = b"", flags: int = 0) -> None:
        for port in range(MANY):
            header = Header(
                *(3, CID_HOST, port, SERVED, len(payload), TYPE_STREAM, op, flags, 65536, 0)
            )
            host.table.receive([header], memoryview(payload))

    packets(Op.REQUEST)
    packets(Op.RW, b"x")
    assert len(host.table) == MANY
    assert received == [b"x"] * MANY
    packets(Op.SHUTDOWN, flags=2)
    await done.wait()
    assert lost == [None] * MANY
    packets(Op.RST)
    assert len(host.table) == 0
    host.table.send(ring)
    server.close()
    await server.wait_closed()
    await host.close()


async def test_a_guest_that_does_not_close_is_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avmm.vsock.table.CLOSE_LIMIT_S", 0.01)
    async with vsock_guest(virtio_rig) as guest:
        writer = await connected(guest)
        writer.close()
        await writer.wait_closed()
        await guest.expect(Op.SHUTDOWN)
        await guest.expect(Op.RST)
        await settle()
        assert guest.counter("connections") == 0


async def test_a_guest_that_takes_nothing_does_not_hold_up_a_close(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("avmm.vsock.table.CLOSE_LIMIT_S", 0.01)
    async with vsock_guest(virtio_rig) as guest:
        guest.buf_alloc = 0
        writer = await connected(guest)
        writer.write(b"never taken")
        writer.close()
        with pytest.raises(ConnectionResetError, match="takes nothing more"):
            await writer.wait_closed()
        await guest.expect(Op.RST)


async def test_a_guest_at_rest_is_given_no_time_to_take_what_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("avmm.vsock.table.CLOSE_LIMIT_S", 0.0)
    async with vsock_guest(virtio_rig) as guest:
        guest.buf_alloc = 0
        writer = await connected(guest)
        await guest.rig.device.quiesce()
        writer.write(b"to be taken afterwards")
        writer.close()
        closed = asyncio.ensure_future(writer.wait_closed())
        await settle()
        assert not closed.done()
        await guest.rig.device.resume()
        with pytest.raises(ConnectionResetError, match="takes nothing more"):
            await closed
        await guest.expect(Op.RST)


async def test_a_connect_that_is_cancelled_leaves_nothing() -> None:
    async with vsock_guest(virtio_rig) as guest:
        connecting = asyncio.ensure_future(guest.host.connect(PORT))
        await guest.expect(Op.REQUEST)
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        await guest.expect(Op.RST)
        await settle()
        assert guest.counter("connections") == 0


async def test_small_pieces_that_wait_for_a_reader_are_joined() -> None:
    received: list[bytes] = []

    class Program(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            received.append(data)

    host = host_of_its_own()
    host.create_server(Program, SERVED)

    def packet(op: Op, payload: bytes = b"") -> None:
        header = Header(3, CID_HOST, 1, SERVED, len(payload), TYPE_STREAM, op, 0, 65536, 0)
        host.table.receive([header], memoryview(payload))

    packet(Op.REQUEST)
    (connection,) = host.table._connections.values()
    transport = connection.events
    assert isinstance(transport, StreamTransport)
    transport.pause_reading()
    sent = [b"%02d" % (i % 100) for i in range(10_000)]
    for piece in sent:
        packet(Op.RW, piece)
    assert received == []
    transport.resume_reading()
    await settle()
    assert b"".join(received) == b"".join(sent)
    assert len(received) <= 10
    await host.close()


async def test_a_port_cannot_be_served_when_the_microvm_has_ended() -> None:
    async with vsock_guest(virtio_rig) as guest:
        host = guest.host
    with pytest.raises(ConnectionResetError, match="has ended"):
        await host.serve(SERVED, wait)
