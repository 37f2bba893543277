"""The two sides of an isolated guest's vsock, in one process: what they say, bounds, and ends."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from avmm.errors import HostError
from avmm.machine.isolation import messages as say
from avmm.machine.isolation import sockets
from avmm.units import MIB
from avmm.vsock import remote, splice
from avmm.vsock.packet import SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, Op
from fakes.apart_vsock import Apart, apart_rig
from fakes.mmio_driver import settle
from fakes.vsock_guest import VsockGuest, vsock_guest

PORT, SERVED = 1024, 5000

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture
async def guest(tmp_path: Path) -> AsyncIterator[VsockGuest]:
    async with vsock_guest(apart_rig, uds=str(tmp_path / "v")) as guest:
        yield guest
        assert apart(guest).broken == []


def apart(guest: VsockGuest) -> Apart:
    assert guest.apart is not None
    return guest.apart


async def served(guest: VsockGuest, port: int = 7) -> Streams:
    """The guest's connection to SERVED."""
    streams: asyncio.Queue[Streams] = asyncio.Queue()
    async with await guest.host.serve(SERVED, lambda *both: streams.put_nowait(both)) as server:
        guest.send(Op.REQUEST, SERVED, port)
        await guest.expect(Op.RESPONSE)
        server._transports.clear()  # they go on
        return await streams.get()


def said(guest: VsockGuest, kind: type[say.Record]) -> list[say.Record]:
    """By the worker."""
    return [record for record in apart(guest).to_program.said if isinstance(record, kind)]


async def test_programs_at_unix_sockets_are_joined_both_ways(
    guest: VsockGuest, tmp_path: Path
) -> None:
    reader, writer = await asyncio.open_unix_connection(tmp_path / "v")
    writer.write(b"CONNECT 7\nfirst")
    header, _ = await guest.expect(Op.REQUEST)
    guest.send(Op.RESPONSE, header.src_port, 7)
    assert await reader.readline() == b"OK %d\n" % header.src_port
    assert (await guest.expect(Op.RW))[1] == b"first"
    writer.close()
    await guest.expect(Op.SHUTDOWN)
    guest.send(Op.RST, header.src_port, 7)

    streams: asyncio.Queue[Streams] = asyncio.Queue()
    server = await asyncio.start_unix_server(
        lambda *both: streams.put_nowait(both), tmp_path / f"v_{SERVED}"
    )
    async with server:
        guest.send(Op.REQUEST, SERVED, 8)
        await guest.expect(Op.RESPONSE)
        reader, writer = await streams.get()
        guest.send(Op.RW, SERVED, 8, b"hello")
        assert await reader.readexactly(5) == b"hello"
        writer.close()
        await guest.expect(Op.SHUTDOWN)
        guest.send(Op.RST, SERVED, 8)
    guest.send(Op.REQUEST, SERVED + 1, 9)
    await guest.expect(Op.RST)


async def test_a_port_that_is_served_here_is_not_asked_for_at_a_unix_socket(
    guest: VsockGuest, tmp_path: Path
) -> None:
    async with await asyncio.start_unix_server(lambda *_: None, tmp_path / f"v_{SERVED}"):
        reader, writer = await served(guest)
        guest.send(Op.RW, SERVED, 7, b"here")
        assert await reader.readexactly(4) == b"here"
        writer.close()


async def test_a_guest_that_closes_what_it_has_not_read_has_closed_properly(
    guest: VsockGuest,
) -> None:
    guest.buf_alloc = 0
    reader, writer = await served(guest)
    writer.write(b"never read")
    guest.send(Op.RW, SERVED, 7, b"bye")
    guest.send(Op.SHUTDOWN, SERVED, 7, flags=SHUTDOWN_BOTH)
    await guest.expect(Op.RST)
    assert await reader.read() == b"bye"
    await writer.wait_closed()


async def test_a_guest_that_receives_no_more_still_sends(guest: VsockGuest) -> None:
    reader, writer = await served(guest)
    guest.send(Op.SHUTDOWN, SERVED, 7, flags=SHUTDOWN_RECEIVE)
    await settle()
    for _ in range(3):
        writer.write(b"for nobody")
        await writer.drain()
    guest.send(Op.RW, SERVED, 7, b"sent")
    assert await reader.readexactly(4) == b"sent"
    guest.send(Op.SHUTDOWN, SERVED, 7, flags=SHUTDOWN_SEND)
    await guest.expect(Op.RST)
    assert await reader.read() == b""


async def test_a_reset_after_the_guests_end_is_a_reset(guest: VsockGuest) -> None:
    reader, writer = await served(guest)
    guest.send(Op.SHUTDOWN, SERVED, 7, flags=SHUTDOWN_SEND)
    assert await reader.read() == b""
    assert not writer.is_closing()
    writer.write(b"goes on")
    assert (await guest.expect(Op.RW))[1] == b"goes on"
    guest.send(Op.RST, SERVED, 7)
    with pytest.raises(ConnectionResetError, match="The guest reset"):
        await writer.wait_closed()


async def test_a_writer_learns_of_a_reset_though_nobody_reads(guest: VsockGuest) -> None:
    _, writer = await served(guest)
    writer.transport.pause_reading()
    for _ in range(2):
        guest.send(Op.RW, SERVED, 7, bytes(60_000))
    await settle()
    guest.send(Op.RST, SERVED, 7)
    await settle()
    writer.write(b"x")
    with pytest.raises(ConnectionResetError, match="The guest reset"):
        await writer.wait_closed()


async def test_a_guest_that_gave_up_before_the_answer_is_forgotten(guest: VsockGuest) -> None:
    streams: asyncio.Queue[Streams] = asyncio.Queue()
    await guest.host.serve(SERVED, lambda *both: streams.put_nowait(both))
    guest.send(Op.REQUEST, SERVED, 7)
    guest.send(Op.RST, SERVED, 7)
    reader, _ = await streams.get()
    with pytest.raises(ConnectionResetError):
        await reader.read()
    assert said(guest, say.Declined) == [say.Declined(0, None)]
    assert guest.counter("connections") == 0
    guest.send(Op.REQUEST, SERVED, 8)
    await guest.expect(Op.RESPONSE)


async def test_no_more_of_the_guests_connections_than_may_be(
    guest: VsockGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart(guest).sockets._table, "_requested_max", 1)
    _, writer = await served(guest)
    await guest.host.serve(SERVED, lambda *_: None)
    guest.send(Op.REQUEST, SERVED, 8)
    await guest.expect(Op.RST)
    writer.transport.abort()
    await guest.expect(Op.RST)
    guest.send(Op.REQUEST, SERVED, 9)
    await guest.expect(Op.RESPONSE)


async def test_no_more_connections_than_there_are_fates(guest: VsockGuest) -> None:
    apart(guest).sockets._fates._free = deque([3])
    connecting = asyncio.ensure_future(guest.host.connect(PORT))
    await guest.accept()
    _, writer = await connecting
    with pytest.raises(HostError, match="1024 connections") as caught:
        await guest.host.connect(PORT)
    assert caught.value.kind == "vsock"
    writer.transport.abort()
    await guest.expect(Op.RST)
    connecting = asyncio.ensure_future(guest.host.connect(PORT))
    await guest.accept()
    await connecting


async def test_a_host_without_descriptors_says_so_and_refuses_the_guest(
    guest: VsockGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    await guest.host.serve(SERVED, lambda *_: None)

    def none(*arguments: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as short:
        short.setattr(socket, "socketpair", none)
        with pytest.raises(HostError, match="socketpair") as caught:
            await guest.host.connect(PORT)
        assert caught.value.kind == "descriptors"
        guest.send(Op.REQUEST, SERVED, 7)
        await guest.expect(Op.RST)
    with monkeypatch.context() as short:
        short.setattr(socket, "send_fds", none)
        with pytest.raises(HostError, match="send") as caught:
            await guest.host.connect(PORT)
        assert caught.value.kind == "descriptors"
        guest.send(Op.REQUEST, SERVED, 8)
        await guest.expect(Op.RST)
    guest.send(Op.REQUEST, SERVED, 9)
    await guest.expect(Op.RESPONSE)
    assert len(apart(guest).sockets._table) == 1


async def test_a_worker_without_descriptors_says_so(
    guest: VsockGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    await guest.host.serve(SERVED, lambda *_: None)
    real = socket.recv_fds

    def cut(*arguments: object) -> object:
        data, fds, flags, address = real(*arguments)  # type: ignore[arg-type]
        for fd in fds:
            socket.close(fd)
        return data, [], flags, address

    with monkeypatch.context() as short:
        short.setattr(socket, "recv_fds", cut)
        with pytest.raises(HostError) as caught:
            await guest.host.connect(PORT)
        assert caught.value.kind == "descriptors"
        guest.send(Op.REQUEST, SERVED, 7)
        await guest.expect(Op.RST)
    assert guest.counter("connections") == 0


async def test_few_sockets_are_on_their_way_at_once(
    guest: VsockGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = 0
    real = socket.send_fds

    def count(*arguments: object) -> int:
        nonlocal sent
        sent += 1
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "send_fds", count)
    taking = apart(guest).relay._on_handed
    asyncio.get_running_loop().remove_reader(apart(guest).relay._way.fileno())
    connecting = [asyncio.ensure_future(guest.host.connect(PORT + i)) for i in range(50)]
    await settle()
    assert sent == sockets._ON_THEIR_WAY_MAX
    connecting[49].cancel()
    asyncio.get_running_loop().add_reader(apart(guest).relay._way.fileno(), taking)
    for _ in range(49):
        while not guest.free_slots:
            await settle()
        await guest.accept()
    await asyncio.gather(*connecting[:49])
    assert sent == 49


async def test_a_guest_without_a_driver_keeps_no_connection_that_was_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(splice, "ASK_LIMIT_S", 0.01)
    async with vsock_guest(apart_rig, start=False) as guest:
        asking = [asyncio.ensure_future(guest.host.connect(PORT)) for _ in range(4)]
        while guest.counter("connections") != 4:
            await settle()
        waiting, *given_up = asking
        for one in given_up:
            one.cancel()
        await asyncio.gather(*given_up, return_exceptions=True)
        while guest.counter("connections") != 1:
            await settle()
        await guest.restart()
        await guest.accept()
        await waiting


async def test_an_end_that_is_seen_before_the_hang_up_is_a_reset_all_the_same(
    guest: VsockGuest,
) -> None:
    await served(guest)
    (connection,) = apart(guest).sockets._table._connections.values()
    apart(guest).sockets._fates.abort(connection.fate)
    connection._socket.shutdown(socket.SHUT_WR)
    await guest.expect(Op.RST)


async def test_a_factory_that_fails_leaves_no_connection(guest: VsockGuest) -> None:
    def fail() -> asyncio.BaseProtocol:
        raise KeyError("a mistake of the program's")

    reported: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: reported.append(context))
    with pytest.raises(KeyError):
        await guest.host.create_connection(fail, PORT)
    guest.host.create_server(fail, SERVED)
    guest.send(Op.REQUEST, SERVED, 7)
    await guest.expect(Op.RST)
    loop.set_exception_handler(None)
    assert [type(context["exception"]) for context in reported] == [KeyError]
    assert len(apart(guest).sockets._table) == 0


async def test_a_guest_at_rest_is_given_no_time_to_take_what_is_left(
    guest: VsockGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avmm.vsock.remote_connection.CLOSE_LIMIT_S", 0.0)
    guest.buf_alloc = 0
    _, writer = await served(guest)
    apart(guest).sockets.hold()
    writer.write(bytes(4 * MIB))  # more than a socket takes
    writer.close()
    closed = asyncio.ensure_future(writer.wait_closed())
    await settle()
    assert not closed.done()
    apart(guest).sockets.resume()
    with pytest.raises(ConnectionResetError, match="takes nothing more"):
        await closed
    await guest.expect(Op.RST)


@pytest.mark.parametrize(
    "record",
    [say.Took(), say.Declined(5, None)],
    ids=["a socket that was not on its way", "a connection that there is not"],
)
async def test_nonsense_is_the_workers_end(tmp_path: Path, record: say.Record) -> None:
    async with vsock_guest(apart_rig) as guest:
        apart(guest).to_program.say(record)
        await settle()
        (error,) = apart(guest).broken
        assert (type(error), error.kind) == (HostError, "worker-protocol")


@pytest.mark.parametrize("answer", [b"OK \n", b"OK 4294967295\n", b"NO\n", b"OK 12345678901"])
async def test_an_answer_without_sense_is_the_workers_end(answer: bytes) -> None:
    async with vsock_guest(apart_rig) as guest:
        asyncio.get_running_loop().remove_reader(apart(guest).relay._way.fileno())
        connecting = asyncio.ensure_future(guest.host.connect(PORT))
        await settle()
        _, (fd,), _, _ = socket.recv_fds(apart(guest).relay._way, 100, 1)
        with socket.socket(fileno=fd) as theirs:
            for at in range(len(answer)):
                theirs.send(answer[at : at + 1])
                await settle()
            with pytest.raises(ConnectionResetError):
                await connecting
        (error,) = apart(guest).broken
        assert (type(error), error.kind) == (HostError, "worker-protocol")


async def test_requests_without_an_ear_for_answers_are_the_workers_end() -> None:
    async with vsock_guest(apart_rig) as guest:
        apart(guest).to_worker.waiting_bytes = 2 << 20
        await guest.host.serve(SERVED, lambda *_: None)
        for port in (1, SERVED):
            apart(guest).to_program.say(say.Requested(0, port, 1))
        await settle()
        for error in apart(guest).broken:
            assert (type(error), error.kind) == (HostError, "worker-protocol")
        assert len(apart(guest).broken) == 2


def test_guests_have_a_part_of_our_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, most in ((1024, 256), (1 << 20, 1024), (remote.resource.RLIM_INFINITY, 1024)):
        monkeypatch.setattr(remote.resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert remote.guests_share() == most
