"""vsock ports as unix sockets, with a guest that is packets in this test."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from avmm.errors import ConfigError
from avmm.vsock import uds
from avmm.vsock.packet import SHUTDOWN_BOTH, SHUTDOWN_SEND, Op
from fakes.mmio_driver import settle
from fakes.refused_accept import Refusing
from fakes.virtio_rig import virtio_rig
from fakes.vsock_guest import VsockGuest, vsock_guest

PORT = 52


@asynccontextmanager
async def guest_at(path: Path) -> AsyncIterator[VsockGuest]:
    async with vsock_guest(virtio_rig, uds=str(path)) as guest:
        yield guest


async def connected(
    guest: VsockGuest, path: Path, command: bytes = b"CONNECT 52\n"
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, int]:
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(command)
    host_port, port = await guest.accept()
    assert port == PORT
    assert await reader.readline() == b"OK %d\n" % host_port
    return reader, writer, host_port


async def test_a_program_of_the_host_connects_to_the_guest(tmp_path: Path) -> None:
    async with guest_at(tmp_path / "v") as guest:
        reader, writer, host_port = await connected(
            guest, tmp_path / "v", b"CONNECT 52\nand what follows"
        )
        assert await guest.receive(16) == b"and what follows"
        guest.send(Op.RW, host_port, PORT, b"answer")
        assert await reader.readexactly(6) == b"answer"
        writer.write_eof()
        header, _ = await guest.expect(Op.SHUTDOWN)
        assert header.flags == SHUTDOWN_SEND
        guest.send(Op.RW, host_port, PORT, b"last")
        guest.send(Op.SHUTDOWN, host_port, PORT, flags=SHUTDOWN_BOTH)
        assert await reader.read() == b"last"
        writer.close()
        await writer.wait_closed()


async def test_a_port_where_nobody_listens_closes_the_socket(tmp_path: Path) -> None:
    async with guest_at(tmp_path / "v") as guest:
        reader, writer = await asyncio.open_unix_connection(tmp_path / "v")
        writer.write(b"CONNECT 52\n")
        header, _ = await guest.expect(Op.REQUEST)
        guest.send(Op.RST, header.src_port, header.dst_port)
        assert await reader.read() == b""
        writer.close()


@pytest.mark.parametrize(
    "command",
    [b"CONNECT\n", b"CONNECT 4294967295\n", b"CONNECT -1\n", b"connect 1\n", b"x" * 32, b"\n"],
)
async def test_what_is_no_command_closes_the_socket(tmp_path: Path, command: bytes) -> None:
    async with guest_at(tmp_path / "v") as guest:
        reader, writer = await asyncio.open_unix_connection(tmp_path / "v")
        writer.write(command)
        assert await reader.read() == b""
        writer.close()
        assert guest.counter("connections") == 0


async def test_the_guest_connects_to_the_socket_of_its_port(tmp_path: Path) -> None:
    streams: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    server = await asyncio.start_unix_server(
        lambda *pair: streams.put_nowait(pair), tmp_path / f"v_{PORT}"
    )
    async with server, guest_at(tmp_path / "v") as guest:
        guest.send(Op.REQUEST, PORT, 7)
        guest.send(Op.RW, PORT, 7, b"hello")  # before anything is answered
        await guest.expect(Op.RESPONSE)
        reader, writer = await streams.get()
        assert await reader.readexactly(5) == b"hello"
        writer.write(b"you")
        assert await guest.receive(3) == b"you"
        writer.close()
        header, _ = await guest.expect(Op.SHUTDOWN)
        guest.send(Op.RST, PORT, 7)
        guest.send(Op.REQUEST, PORT + 1, 8)
        header, _ = await guest.expect(Op.RST)
        assert header.src_port == PORT + 1


async def test_the_guests_end_ends_the_program(tmp_path: Path) -> None:
    async with guest_at(tmp_path / "v") as guest:
        reader, writer, host_port = await connected(guest, tmp_path / "v")
        guest.send(Op.RST, host_port, PORT)
        assert await reader.read() == b""
        writer.close()


async def test_a_program_that_does_not_read_stops_the_guest(tmp_path: Path) -> None:
    async with guest_at(tmp_path / "v") as guest:
        with socket.socket(socket.AF_UNIX) as program:
            program.connect(str(tmp_path / "v"))
            program.sendall(b"CONNECT 52\n")
            host_port, _ = await guest.accept()
            piece = bytes(range(256)) * 256
            sent = told = 0
            while sent - told <= 192 * 1024:
                guest.send(Op.RW, host_port, PORT, piece)
                sent += len(piece)
                await settle()
                while guest.has_packet():
                    told = (await guest.expect(Op.CREDIT_UPDATE))[0].fwd_cnt
            assert guest.counter("connections") == 1
            program.settimeout(20)
            read = asyncio.to_thread(program.recv, 3)
            assert await read == b"OK "


async def test_all_sockets_go_with_the_device(tmp_path: Path) -> None:
    async with guest_at(tmp_path / "v") as guest:
        reader, writer, _ = await connected(guest, tmp_path / "v")
        waiting, other = await asyncio.open_unix_connection(tmp_path / "v")
        await settle()
    assert await reader.read() == b""
    assert await waiting.read() == b""
    for each in (writer, other):
        each.close()
    assert not (tmp_path / "v").exists()


async def test_a_path_that_cannot_be_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "v", tmp_path / ("x" * 120)):
        with pytest.raises(ConfigError, match="Socket"):
            async with guest_at(path):
                pass


async def test_a_connection_without_a_descriptor_leaves_the_loop_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uds, "_REST_S", 3600.0)
    async with guest_at(tmp_path / "v"):
        refusing = Refusing(monkeypatch, 1000)
        _, writer = await asyncio.open_unix_connection(tmp_path / "v")
        await settle()
        assert refusing.refused == 1
        writer.close()


async def test_a_connection_without_a_descriptor_is_taken_when_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uds, "_REST_S", 0.0)
    async with guest_at(tmp_path / "v") as guest:
        refusing = Refusing(monkeypatch, 3)
        _, writer = await asyncio.open_unix_connection(tmp_path / "v")
        writer.write(b"CONNECT 52\n")
        assert await guest.accept()
        assert refusing.refused == 3
        writer.close()
