"""virtio-vsock over real rings, by sections of the specification (virtio 1.3, 5.10)."""

from __future__ import annotations

import asyncio
import struct

import pytest

from avmm.errors import ConfigError
from avmm.log import LINES_AT_ONCE
from avmm.vsock.credit import BUFFER_BYTES, UPDATE_BYTES
from avmm.vsock.packet import SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, Op
from fakes.apart_vsock import apart_rig
from fakes.driver_queue import Segment
from fakes.mmio_driver import settle
from fakes.pci_driver import pci_rig
from fakes.virtio_rig import DATA_GPA, virtio_rig
from fakes.vsock_guest import CID, Rigged, VsockGuest, vsock_guest

pytestmark = pytest.mark.parametrize(
    "rigged", [virtio_rig, pci_rig, apart_rig], ids=["mmio", "pci", "apart"]
)

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
PORT, SERVED = 1024, 5000


async def connected(guest: VsockGuest) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, int]:
    """A connection of the host's to PORT; the host's port."""
    connecting = asyncio.ensure_future(guest.host.connect(PORT))
    host_port, port = await guest.accept()
    assert port == PORT
    return *(await connecting), host_port


class Served:
    """A server of the host's at SERVED, and the streams it was called with."""

    def __init__(self) -> None:
        self.streams: asyncio.Queue[Streams] = asyncio.Queue()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.streams.put_nowait((reader, writer))


async def test_5_10_4_the_configuration_is_the_guests_cid(rigged: Rigged) -> None:
    async with vsock_guest(rigged) as guest:
        assert guest.rig.device.config.data == struct.pack("<Q", CID)
        assert guest.rig.device.device_type.virtio_id == 19


async def test_5_10_6_5_a_connection_stands_when_the_guest_responds(rigged: Rigged) -> None:
    async with vsock_guest(rigged) as guest:
        reader, writer, host_port = await connected(guest)
        assert writer.get_extra_info("peername") == (CID, PORT)
        assert writer.get_extra_info("sockname") == (2, host_port)
        writer.write(b"to the guest")
        assert await guest.receive(12) == b"to the guest"
        guest.send(Op.RW, host_port, PORT, b"to the host")
        assert await reader.readexactly(11) == b"to the host"
        assert not writer.is_closing()
        writer.close()
        await writer.wait_closed()
        header, _ = await guest.expect(Op.SHUTDOWN)
        assert header.flags == SHUTDOWN_BOTH
        guest.send(Op.RST, host_port, PORT)
        await settle()
        assert guest.counter("connections") == 0


async def test_5_10_6_5_a_reset_instead_is_a_refusal(rigged: Rigged) -> None:
    async with vsock_guest(rigged) as guest:
        connecting = asyncio.ensure_future(guest.host.connect(PORT))
        header, _ = await guest.expect(Op.REQUEST)
        guest.send(Op.RST, header.src_port, PORT)
        with pytest.raises(ConnectionRefusedError, match="1024"):
            await connecting
        assert guest.counter("connections") == 0


async def test_a_guest_that_does_not_answer_is_given_up(rigged: Rigged) -> None:
    async with vsock_guest(rigged) as guest:
        with pytest.raises(TimeoutError, match="1024"):
            await guest.host.connect(PORT, timeout_s=0.01)
        await guest.expect(Op.REQUEST)
        await guest.expect(Op.RST)
        await settle()
        assert guest.counter("connections") == 0


async def test_5_10_6_5_the_guest_connects_to_a_server(rigged: Rigged) -> None:
    served = Served()
    async with vsock_guest(rigged) as guest, await guest.host.serve(SERVED, served) as server:
        guest.send(Op.REQUEST, SERVED, 7)
        await guest.expect(Op.RESPONSE)
        reader, writer = await served.streams.get()
        assert writer.get_extra_info("peername") == (CID, 7)
        guest.send(Op.RW, SERVED, 7, b"hello")
        assert await reader.readexactly(5) == b"hello"
        server.close()
        guest.send(Op.REQUEST, SERVED, 8)
        await guest.expect(Op.RST)  # of 8: what is there goes on
        writer.write(b"you")
        assert await guest.receive(3) == b"you"
        writer.close()
        await guest.expect(Op.SHUTDOWN)
        guest.send(Op.RST, SERVED, 7)


async def test_5_10_6_5_a_port_that_nobody_serves_is_reset(rigged: Rigged) -> None:
    async with vsock_guest(rigged) as guest:
        guest.send(Op.REQUEST, SERVED, 7)
        header, _ = await guest.expect(Op.RST)
        assert (header.src_port, header.dst_port) == (SERVED, 7)
        assert guest.counter("refused") == 1


async def test_a_port_is_served_once(rigged: Rigged) -> None:
    async with vsock_guest(rigged) as guest, await guest.host.serve(SERVED, Served()):
        with pytest.raises(ConfigError, match="5000 is served already"):
            await guest.host.serve(SERVED, Served())
        for port in (-1, 2**32 - 1, True, "1"):
            with pytest.raises(ConfigError, match="is not in 0 to"):
                await guest.host.serve(port, Served())  # type: ignore[arg-type]


async def test_5_10_6_3_a_payload_is_cut_by_the_guests_buffers(rigged: Rigged) -> None:
    async with vsock_guest(rigged, buffers=4, buffer_bytes=1024) as guest:
        _, writer, _ = await connected(guest)
        data = bytes(range(256)) * 40
        writer.write(data)
        assert await guest.receive(len(data)) == data
        await writer.drain()


async def test_5_10_6_3_no_more_is_sent_than_the_guest_has_room_for(rigged: Rigged) -> None:
    async with vsock_guest(rigged) as guest:
        guest.buf_alloc = 10_000
        _, writer, host_port = await connected(guest)
        data = bytes(range(256)) * 400
        writer.write(data)
        draining = asyncio.ensure_future(writer.drain())
        came = b""
        while len(came) < 10_000:
            came += (await guest.expect(Op.RW))[1]
        await settle()
        assert len(came) == 10_000
        assert draining.done() is bool(guest.between_bytes)
        guest.fwd_cnt[host_port] = 10_000
        guest.send(Op.CREDIT_UPDATE, host_port, PORT)
        while len(came) < 20_000:
            came += (await guest.expect(Op.RW))[1]
        guest.fwd_cnt[host_port] = 20_000
        guest.buf_alloc = 200_000
        guest.send(Op.CREDIT_UPDATE, host_port, PORT)
        while len(came) < len(data):
            came += (await guest.expect(Op.RW))[1]
        assert came == data
        await draining


async def test_5_10_6_3_a_reader_that_does_not_read_stops_the_guest(rigged: Rigged) -> None:
    async with vsock_guest(rigged) as guest:
        reader, writer, host_port = await connected(guest)
        piece = bytes(range(256)) * 256
        header = None
        sent = told = 0
        # As a guest that keeps the rules: until there is no room that it knows of.
        while sent - told + len(piece) <= BUFFER_BYTES:
            guest.send(Op.RW, host_port, PORT, piece)
            sent += len(piece)
            await settle()
            while guest.has_packet():
                header, _ = await guest.expect(Op.CREDIT_UPDATE)
                assert header.buf_alloc == BUFFER_BYTES
                told = header.fwd_cnt
        assert header is not None
        assert sent <= BUFFER_BYTES + 4 * len(piece) + guest.between_bytes
        assert await reader.readexactly(sent) == piece * (sent // len(piece))
        while sent - (await guest.expect(Op.CREDIT_UPDATE))[0].fwd_cnt >= UPDATE_BYTES:
            pass  # each is told as it comes about
        writer.close()


async def test_5_10_6_3_a_credit_request_is_answered(rigged: Rigged) -> None:
    async with vsock_guest(rigged) as guest:
        reader, writer, host_port = await connected(guest)
        guest.send(Op.RW, host_port, PORT, b"12345")
        assert await reader.readexactly(5) == b"12345"
        guest.send(Op.CREDIT_REQUEST, host_port, PORT)
        header, _ = await guest.expect(Op.CREDIT_UPDATE)
        assert header.fwd_cnt == 5
        writer.close()


async def test_5_10_6_5_half_a_connection_closes(rigged: Rigged) -> None:
    async with vsock_guest(rigged) as guest:
        reader, writer, host_port = await connected(guest)
        writer.write(b"all")
        writer.write_eof()
        with pytest.raises(RuntimeError, match="write_eof"):
            writer.write(b"more")
        assert await guest.receive(3) == b"all"
        header, _ = await guest.expect(Op.SHUTDOWN)
        assert header.flags == SHUTDOWN_SEND
        guest.send(Op.RW, host_port, PORT, b"answer")
        guest.send(Op.SHUTDOWN, host_port, PORT, flags=SHUTDOWN_SEND)
        assert await reader.read() == b"answer"
        writer.close()
        await writer.wait_closed()
        header, _ = await guest.expect(Op.SHUTDOWN)
        assert header.flags == SHUTDOWN_BOTH
        guest.send(Op.RST, host_port, PORT)


async def test_5_10_6_5_a_guest_that_closes_is_answered_by_a_reset(rigged: Rigged) -> None:
    async with vsock_guest(rigged) as guest:
        reader, writer, host_port = await connected(guest)
        guest.send(Op.RW, host_port, PORT, b"last")
        guest.send(Op.SHUTDOWN, host_port, PORT, flags=SHUTDOWN_BOTH)
        await guest.expect(Op.RST)
        assert await reader.read() == b"last"
        assert writer.is_closing()
        writer.write(b"too late")
        with pytest.raises(ConnectionResetError):
            await writer.drain()
        writer.close()
        await writer.wait_closed()


async def test_what_came_before_the_guest_closed_waits_for_its_reader(rigged: Rigged) -> None:
    async with vsock_guest(rigged) as guest:
        reader, writer, host_port = await connected(guest)
        piece = bytes(range(256)) * 256
        for _ in range(4):
            guest.send(Op.RW, host_port, PORT, piece)
        guest.send(Op.SHUTDOWN, host_port, PORT, flags=SHUTDOWN_RECEIVE)
        guest.send(Op.SHUTDOWN, host_port, PORT, flags=SHUTDOWN_SEND)
        while (await guest.packet())[0].op != Op.RST:
            pass
        assert guest.counter("connections") == 0
        assert await reader.read() == piece * 4
        writer.close()


async def test_5_10_6_5_a_reset_ends_the_streams(rigged: Rigged) -> None:
    async with vsock_guest(rigged) as guest:
        reader, writer, host_port = await connected(guest)
        guest.send(Op.RST, host_port, PORT)
        with pytest.raises(ConnectionResetError, match="The guest reset"):
            await reader.read()
        with pytest.raises(ConnectionResetError):
            await writer.drain()
        writer.close()


async def test_abort_resets(rigged: Rigged) -> None:
    async with vsock_guest(rigged) as guest:
        reader, writer, _ = await connected(guest)
        writer.write(bytes(100_000))
        writer.transport.abort()
        await guest.expect(Op.RST)
        assert await reader.read() == b""


async def test_close_sends_first_what_was_written(rigged: Rigged) -> None:
    async with vsock_guest(rigged) as guest:
        _, writer, host_port = await connected(guest)
        data = bytes(range(256)) * 1200
        writer.write(data)
        writer.close()
        closing = asyncio.ensure_future(writer.wait_closed())
        assert await guest.receive(BUFFER_BYTES) == data[:BUFFER_BYTES]
        assert closing.done() is bool(guest.between_bytes)
        assert await guest.receive(len(data) - BUFFER_BYTES) == data[BUFFER_BYTES:]
        await guest.expect(Op.SHUTDOWN)
        await closing
        guest.send(Op.RST, host_port, PORT)


@pytest.mark.parametrize(
    ("op", "fwd_cnt", "why"),
    [
        (Op.CREDIT_UPDATE, 1, "it has read more than it was sent"),
        (Op.RW, 0xFFFF_FFFF, "it has read more than it was sent"),
        (Op.INVALID, 0, "an operation out of place"),
        (99, 0, "an operation out of place"),
        (Op.REQUEST, 0, "an operation out of place"),
        (Op.RESPONSE, 0, "an operation out of place"),
    ],
)
async def test_5_10_6_a_guest_that_breaks_the_rules_loses_the_connection(
    rigged: Rigged, op: int, fwd_cnt: int, why: str
) -> None:
    async with vsock_guest(rigged) as guest:
        reader, writer, host_port = await connected(guest)
        guest.send(op, host_port, PORT, fwd_cnt=fwd_cnt)
        with pytest.raises(ConnectionResetError, match=f"The guest broke the connection: {why}"):
            await reader.read()
        await guest.expect(Op.RST)
        writer.close()
        _, writer, _ = await connected(guest)  # others go on
        writer.write(b"ok")
        assert await guest.receive(2) == b"ok"


async def test_data_after_the_guests_end_ends_the_connection(rigged: Rigged) -> None:
    async with vsock_guest(rigged) as guest:
        ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

        class Program(asyncio.Protocol):
            def eof_received(self) -> bool:
                guest.send(Op.RW, host_port, PORT, b"more")
                return True

            def connection_lost(self, error: Exception | None) -> None:
                ended.set_result(error)

        connecting = asyncio.ensure_future(guest.host.create_connection(Program, PORT))
        host_port, _ = await guest.accept()
        await connecting
        guest.send(Op.SHUTDOWN, host_port, PORT, flags=SHUTDOWN_SEND)
        assert "data out of place" in str(await ended)


@pytest.mark.parametrize(
    ("op", "why"), [(Op.RW, "data out of place"), (Op.SHUTDOWN, "shutdown out of place")]
)
async def test_a_guest_that_has_not_accepted_may_only_do_so_or_refuse(
    rigged: Rigged, op: Op, why: str
) -> None:
    async with vsock_guest(rigged) as guest:
        connecting = asyncio.ensure_future(guest.host.connect(PORT))
        header, _ = await guest.expect(Op.REQUEST)
        guest.send(op, header.src_port, PORT, flags=SHUTDOWN_SEND)
        with pytest.raises(ConnectionResetError, match=f"The guest broke the connection: {why}"):
            await connecting


async def test_5_10_6_3_more_than_there_is_room_for_ends_the_connection(rigged: Rigged) -> None:
    async with vsock_guest(rigged) as guest:
        reader, writer, host_port = await connected(guest)
        for _ in range(8):
            guest.send(Op.RW, host_port, PORT, bytes(64 * 1024))
        while (await guest.packet())[0].op != Op.RST:
            pass
        with pytest.raises(ConnectionResetError, match="it sends more than there is room"):
            await reader.readexactly(8 * 64 * 1024)
        writer.close()


async def test_5_10_6_4_an_unknown_type_is_reset(rigged: Rigged) -> None:
    async with vsock_guest(rigged) as guest:
        guest.send(Op.REQUEST, SERVED, 7, type=2)
        header, _ = await guest.expect(Op.RST)
        assert header.type == 2
        guest.send(Op.RST, SERVED, 7, type=2)  # is not answered
        guest.send(Op.RW, SERVED, 7, b"x")
        header, _ = await guest.expect(Op.RST)
        assert header.type == 1


async def test_5_10_6_2_nobody_sends_in_anothers_name(rigged: Rigged) -> None:
    async with vsock_guest(rigged) as guest, await guest.host.serve(SERVED, Served()):
        guest.send(Op.REQUEST, SERVED, 7, src_cid=4)
        guest.send(Op.REQUEST, SERVED, 7, src_cid=CID | 1 << 40)
        await settle()
        assert not guest.has_packet()
        assert guest.counter("strayed") == 2
        assert guest.counter("connections") == 0


@pytest.mark.parametrize("cid", [0, 1, CID, 4, 0xFFFF_FFFF, 2 | 1 << 40])
async def test_5_10_6_5_nobody_listens_at_another_address(rigged: Rigged, cid: int) -> None:
    async with vsock_guest(rigged) as guest, await guest.host.serve(SERVED, Served()):
        reader, writer, host_port = await connected(guest)
        for op, host, port in ((Op.REQUEST, SERVED, 7), (Op.RW, host_port, PORT)):
            guest.send(op, host, port, b"x" * (op == Op.RW), dst_cid=cid)
            header, _ = await guest.packet()
            assert (header.op, header.src_cid, header.dst_cid) == (Op.RST, cid, CID)
            assert (header.src_port, header.dst_port) == (host, port)
        guest.send(Op.RST, host_port, PORT, dst_cid=cid)
        guest.send(Op.RW, host_port, PORT, b"goes on")
        assert await reader.readexactly(7) == b"goes on"
        assert guest.counter("strayed") == 2
        assert guest.counter("connections") == 1
        writer.close()


@pytest.mark.parametrize("data", [bytes(43), None], ids=["no header", "shorter than its length"])
async def test_a_chain_that_is_no_packet_is_the_drivers_fault(
    rigged: Rigged, data: bytes | None
) -> None:
    async with vsock_guest(rigged) as guest:
        reader, writer, host_port = await connected(guest)
        if data is None:
            guest.send(Op.RW, host_port, PORT, b"short", size_bytes=6)
        else:
            guest.send_bytes(data)
        with pytest.raises(ConnectionResetError, match="The guest broke its vsock device"):
            await reader.read()
        assert guest.rig.device.statistics().last_fault == "request"
        writer.close()
        await guest.restart()
        _, writer, _ = await connected(guest)
        writer.close()


async def test_a_buffer_too_small_for_a_packet_is_the_drivers_fault(rigged: Rigged) -> None:
    async with vsock_guest(rigged, buffers=0) as guest:
        guest.rig.driver.queues[0].offer(Segment(DATA_GPA, 43, writable=True))
        guest.rig.driver.kick(0)
        connecting = asyncio.ensure_future(guest.host.connect(PORT))
        await settle()
        assert guest.rig.device.statistics().last_fault == "request"
        connecting.cancel()


async def test_a_packet_may_lie_in_many_pieces(rigged: Rigged) -> None:
    async with vsock_guest(rigged) as guest:
        reader, writer, host_port = await connected(guest)
        guest.send(Op.RW, host_port, PORT, b"in five pieces", cuts=(1, 20, 44, 50))
        assert await reader.readexactly(14) == b"in five pieces"
        writer.close()


async def test_a_connection_asked_for_before_the_driver_is_there_waits(rigged: Rigged) -> None:
    async with vsock_guest(rigged, start=False) as guest:
        connecting = asyncio.ensure_future(guest.host.connect(PORT))
        await settle()
        await guest.restart()
        await guest.accept()
        (await connecting)[1].close()


async def test_a_reset_of_the_driver_ends_all_streams(rigged: Rigged) -> None:
    async with vsock_guest(rigged) as guest:
        reader, writer, _ = await connected(guest)
        await guest.restart()
        with pytest.raises(ConnectionResetError, match="The guest's vsock driver was reset"):
            await reader.read()
        writer.close()
        assert guest.counter("connections") == 0


async def test_nothing_moves_at_rest_and_nothing_is_lost(rigged: Rigged) -> None:
    async with vsock_guest(rigged) as guest:
        reader, writer, host_port = await connected(guest)
        await guest.rig.device.quiesce()
        writer.write(b"waits")
        guest.send(Op.RW, host_port, PORT, b"waits too")
        await settle()
        assert not guest.has_packet()
        await guest.rig.device.resume()
        assert await guest.receive(5) == b"waits"
        assert await reader.readexactly(9) == b"waits too"
        writer.close()


async def test_5_10_6_1_a_guest_that_takes_no_answers_is_not_heard(
    rigged: Rigged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avmm.vsock.table._REPLIES_MAX", 8)
    async with vsock_guest(rigged, buffers=0) as guest:
        for port in range(400):
            if not guest.free_slots:
                break
            guest.send(Op.RW, SERVED, port)
            await settle()
        assert guest.free_slots == 0
        sent = guest.sent
        guest.offer(32)
        for port in range(sent):
            header, _ = await guest.expect(Op.RST)
            assert header.dst_port == port
        await settle()
        guest.send(Op.RW, SERVED, 9999)  # and is heard again
        assert (await guest.expect(Op.RST))[0].dst_port == 9999


async def test_the_end_of_the_device_ends_all_streams(
    rigged: Rigged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avmm.vsock.host._HANDLERS_LIMIT_S", 0.02)
    ended: list[BaseException] = []

    async def callback(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        try:
            await reader.read()
        except ConnectionError as e:
            ended.append(e)
            raise

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as e:
            ended.append(e)
            raise

    async with vsock_guest(rigged) as guest:
        await guest.host.serve(SERVED, callback)
        await guest.host.serve(SERVED + 1, hang)
        guest.send(Op.REQUEST, SERVED, 7)
        guest.send(Op.REQUEST, SERVED + 1, 7)
        reader, writer, _ = await connected_after(guest, 2)
        connecting = asyncio.ensure_future(guest.host.connect(PORT))
        await settle()
    for call in (reader.read(), writer.drain(), connecting):
        with pytest.raises(ConnectionResetError, match=r"The microVM has ended|lost"):
            await call
    with pytest.raises(ConnectionResetError, match="The microVM has ended"):
        await guest.host.connect(PORT)
    assert [type(e) for e in ended] == [ConnectionResetError, asyncio.CancelledError]


async def connected_after(
    guest: VsockGuest, responses: int
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, int]:
    for _ in range(responses):
        await guest.expect(Op.RESPONSE)
    return await connected(guest)


async def test_a_callback_that_fails_resets_its_connection_alone(rigged: Rigged) -> None:
    async def broken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise ValueError("broken")

    failures: list[dict[str, object]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: failures.append(context))
    async with vsock_guest(rigged) as guest, await guest.host.serve(SERVED, broken):
        guest.send(Op.REQUEST, SERVED, 7)
        while (await guest.packet())[0].op != Op.RST:
            pass
        assert str(failures[0]["exception"]) == "broken"
        _, writer, _ = await connected(guest)
        writer.close()
        for port in range(8, 8 + 2 * LINES_AT_ONCE):
            guest.send(Op.REQUEST, SERVED, port)
            while (await guest.packet())[0].op != Op.RST:
                pass
        assert len(failures) == LINES_AT_ONCE
    loop.set_exception_handler(None)
