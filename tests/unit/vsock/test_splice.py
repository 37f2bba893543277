"""Connections between the guest and unix sockets, which the native lane moves by itself."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from avmm.vsock import splice
from avmm.vsock.credit import BUFFER_BYTES
from avmm.vsock.packet import SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, Op
from fakes.mmio_driver import settle
from fakes.virtio_rig import virtio_rig
from fakes.vsock_guest import VsockGuest, vsock_guest

PORT = 52
PIECE = bytes(range(256)) * 64

pytestmark = pytest.mark.parametrize("io_threads", [0, 1], ids=["loop", "thread"])


@asynccontextmanager
async def guest_at(path: Path, io_threads: int, **options: int) -> AsyncIterator[VsockGuest]:
    rigged = partial(virtio_rig, io_threads=io_threads)
    async with vsock_guest(rigged, uds=str(path / "v"), **options) as guest:
        yield guest


@asynccontextmanager
async def listening(path: Path, port: int = PORT) -> AsyncIterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as server:
        server.bind(str(path / f"v_{port}"))
        server.listen(64)
        try:
            yield server
        finally:
            (path / f"v_{port}").unlink()


@asynccontextmanager
async def joined(
    guest: VsockGuest, path: Path, guest_port: int = 7
) -> AsyncIterator[socket.socket]:
    """A connection that the guest has made, and the program's end of it."""
    async with listening(path) as server:
        guest.send(Op.REQUEST, PORT, guest_port)
        await guest.expect(Op.RESPONSE)
        program, _ = await asyncio.get_running_loop().sock_accept(server)
    program.setblocking(False)
    with program:
        yield program


async def read(program: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = await asyncio.get_running_loop().sock_recv(program, count - len(data))
        assert piece, "it ended early"
        data += piece
    return data


def duplicate_of_devices_end(path: Path) -> int:
    """A descriptor of the socket by which the device is connected, as a forked child has one."""
    for entry in os.listdir("/proc/self/fd"):
        try:
            fd = os.dup(int(entry))
        except OSError:
            continue
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            with socket.socket(fileno=os.dup(fd)) as found:
                try:
                    if found.getpeername() == str(path / f"v_{PORT}"):
                        return fd
                except OSError:
                    pass
        os.close(fd)
    raise AssertionError("the device has no such socket")


def is_watched(fd: int) -> bool:
    """Whether any epoll of this process has its file."""
    inode = f" ino:{os.fstat(fd).st_ino:x} "
    for entry in os.listdir("/proc/self/fdinfo"):
        try:
            lines = Path("/proc/self/fdinfo", entry).read_text().splitlines()
        except FileNotFoundError:
            continue
        if any(line.startswith("tfd:") and inode in line for line in lines):
            return True
    return False


async def ended(guest: VsockGuest) -> None:
    """No connection is left; their ends may be a thread's work."""
    while guest.counter("connections"):
        await settle()


async def test_a_program_that_reads_late_gets_all_and_the_guest_keeps_to_its_room(
    tmp_path: Path, io_threads: int
) -> None:
    async with guest_at(tmp_path, io_threads) as guest, joined(guest, tmp_path) as program:
        program.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sent, told, came = bytearray(), 0, b""
        for round_ in range(64):
            while len(sent) - told + len(PIECE) > BUFFER_BYTES:
                came += await read(program, len(sent) - len(came))
                told = (await guest.expect(Op.CREDIT_UPDATE))[0].fwd_cnt
            piece = PIECE[round_:] + PIECE[:round_]
            guest.send(Op.RW, PORT, 7, piece, cuts=(44 + round_,))
            sent += piece
            while not guest.free_slots:
                await settle()
        guest.send(Op.SHUTDOWN, PORT, 7, flags=SHUTDOWN_SEND)
        came += await read(program, len(sent) - len(came))
        assert came == sent
        assert await asyncio.get_running_loop().sock_recv(program, 1) == b""
        assert guest.counter("rx_bytes") == len(sent)


async def test_a_program_sends_as_the_guest_has_room(tmp_path: Path, io_threads: int) -> None:
    async with guest_at(tmp_path, io_threads, buffers=8, buffer_bytes=300) as guest:
        guest.buf_alloc = 10_000
        async with joined(guest, tmp_path) as program:
            data = PIECE * 4
            sending = asyncio.ensure_future(asyncio.get_running_loop().sock_sendall(program, data))
            came = b""
            while len(came) < len(data):
                goal = min(len(data), len(came) + 10_000)
                while len(came) < goal:
                    came += (await guest.expect(Op.RW))[1]
                await settle()
                assert not guest.has_packet()
                guest.fwd_cnt[PORT] = len(came)
                guest.send(Op.CREDIT_UPDATE, PORT, 7)
            await sending
            assert came == data
            assert guest.counter("tx_bytes") == len(data)


async def test_descriptors_that_a_program_sends_are_lost_and_no_byte_is(
    tmp_path: Path, io_threads: int
) -> None:
    async with guest_at(tmp_path, io_threads) as guest, joined(guest, tmp_path) as program:
        for _ in range(2):
            socket.send_fds(program, [b"one"], [program.fileno()])
            program.send(b"two")
        assert await guest.receive(12) == b"onetwoonetwo"


async def test_the_socket_of_an_ended_connection_is_watched_no_more_though_a_child_has_it(
    tmp_path: Path, io_threads: int
) -> None:
    async with guest_at(tmp_path, io_threads) as guest, joined(guest, tmp_path):
        childs = duplicate_of_devices_end(tmp_path)
        try:
            assert is_watched(childs)
            guest.send(Op.RST, PORT, 7)
            await ended(guest)
            assert not is_watched(childs)
        finally:
            os.close(childs)


async def test_credit_that_comes_with_a_shutdown_is_used(tmp_path: Path, io_threads: int) -> None:
    async with guest_at(tmp_path, io_threads) as guest:
        guest.buf_alloc = 0
        async with joined(guest, tmp_path) as program:
            program.send(b"waits")
            # More than the socket takes, so that the shutdown is not passed on at once.
            for _ in range(BUFFER_BYTES // len(PIECE)):
                guest.send(Op.RW, PORT, 7, PIECE)
                while not guest.free_slots:
                    await settle()
            await guest.expect(Op.CREDIT_UPDATE)
            await settle()
            guest.buf_alloc = 100
            guest.send(Op.SHUTDOWN, PORT, 7, flags=SHUTDOWN_SEND)
            assert (await guest.expect(Op.RW))[1] == b"waits"


@pytest.mark.parametrize("greedy", ["python", "program"])
async def test_python_and_programs_have_what_room_there_is_in_turns(
    tmp_path: Path, io_threads: int, greedy: str
) -> None:
    many, buffers, payload_bytes = bytes(1 << 20), 4, 256
    loop = asyncio.get_running_loop()
    async with guest_at(
        tmp_path, io_threads, buffers=buffers, buffer_bytes=44 + payload_bytes
    ) as guest:
        guest.buf_alloc = 1 << 30
        connecting = asyncio.ensure_future(guest.host.connect(9))
        pythons, _ = await guest.accept()
        _, writer = await connecting
        async with joined(guest, tmp_path) as program:
            if greedy == "python":
                writer.write(many)
            else:
                flood = asyncio.ensure_future(loop.sock_sendall(program, many))
            while guest.counter("tx_bytes") < buffers * payload_bytes:
                await settle()
            if greedy == "python":
                program.send(b"x")
            else:
                writer.write(b"x")
            await settle()
            for _ in range(100):
                header, payload = await guest.expect(Op.RW)
                if (header.src_port == pythons) == (greedy == "program"):
                    break
            assert payload == b"x"
            writer.transport.abort()
            if greedy == "program":
                flood.cancel()


async def test_a_program_that_closes_ends_the_connection(tmp_path: Path, io_threads: int) -> None:
    async with guest_at(tmp_path, io_threads) as guest:
        async with joined(guest, tmp_path) as program:
            program.send(b"last")
        assert await guest.receive(4) == b"last"
        header, _ = await guest.expect(Op.SHUTDOWN)
        assert header.flags == SHUTDOWN_BOTH
        guest.send(Op.RW, PORT, 7, b"on its way")
        guest.send(Op.RST, PORT, 7)
        await ended(guest)


async def test_a_program_that_closes_half_still_reads(tmp_path: Path, io_threads: int) -> None:
    async with guest_at(tmp_path, io_threads) as guest, joined(guest, tmp_path) as program:
        program.shutdown(socket.SHUT_WR)
        header, _ = await guest.expect(Op.SHUTDOWN)
        assert header.flags == SHUTDOWN_SEND
        guest.send(Op.RW, PORT, 7, b"answer")
        assert await read(program, 6) == b"answer"
        program.close()
        header, _ = await guest.expect(Op.SHUTDOWN)
        assert header.flags == SHUTDOWN_BOTH


async def test_a_program_that_reads_no_more_is_told_to_the_guest(
    tmp_path: Path, io_threads: int
) -> None:
    async with guest_at(tmp_path, io_threads) as guest, joined(guest, tmp_path) as program:
        program.shutdown(socket.SHUT_RD)
        guest.send(Op.RW, PORT, 7, b"for nobody")
        header, _ = await guest.expect(Op.SHUTDOWN)
        assert header.flags == SHUTDOWN_RECEIVE
        program.send(b"it still writes")
        assert await guest.receive(15) == b"it still writes"


async def test_a_guest_that_receives_no_more_breaks_the_programs_pipe(
    tmp_path: Path, io_threads: int
) -> None:
    async with guest_at(tmp_path, io_threads) as guest, joined(guest, tmp_path) as program:
        guest.send(Op.SHUTDOWN, PORT, 7, flags=SHUTDOWN_RECEIVE)
        guest.send(Op.RW, PORT, 7, b"x")
        assert await read(program, 1) == b"x"
        with pytest.raises(BrokenPipeError):
            program.send(b"y")


async def left_unread(guest: VsockGuest, guest_port: int = 7) -> bytes:
    """What the guest has sent before it closed, more than a socket takes."""
    pieces = BUFFER_BYTES // len(PIECE)
    for _ in range(pieces):
        guest.send(Op.RW, PORT, guest_port, PIECE)
        while not guest.free_slots:
            await settle()
    guest.send(Op.SHUTDOWN, PORT, guest_port, flags=SHUTDOWN_BOTH)
    return PIECE * pieces


async def until_reset(guest: VsockGuest) -> None:
    while (await guest.packet())[0].op != Op.RST:
        pass


async def test_what_came_before_the_guest_closed_waits_for_the_program(
    tmp_path: Path, io_threads: int
) -> None:
    async with guest_at(tmp_path, io_threads) as guest, joined(guest, tmp_path) as program:
        sent = await left_unread(guest)
        await until_reset(guest)
        assert await read(program, BUFFER_BYTES) == sent
        assert await asyncio.get_running_loop().sock_recv(program, 1) == b""
        await ended(guest)


@pytest.mark.parametrize("end", ["takes no reset", "resets", "begins anew"])
async def test_a_program_comes_to_the_end_though_the_guest_does_not_wait(
    tmp_path: Path, io_threads: int, end: str
) -> None:
    async with (
        guest_at(tmp_path, io_threads, buffers=1) as guest,
        joined(guest, tmp_path) as program,
    ):
        program.send(b"fills the ring")
        sent = await left_unread(guest)
        if end == "resets":
            guest.send(Op.RST, PORT, 7)
        elif end == "begins anew":
            while guest.unheard:
                await settle()
            await guest.restart()
        assert await read(program, BUFFER_BYTES) == sent
        assert await asyncio.get_running_loop().sock_recv(program, 1) == b""
        if end != "takes no reset":
            await ended(guest)


async def test_few_closed_connections_wait_for_their_programs(
    tmp_path: Path, io_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splice, "UNREAD_MAX", 1)
    async with guest_at(tmp_path, io_threads) as guest, joined(guest, tmp_path, 7) as first:
        async with joined(guest, tmp_path, 8) as second:
            sent = await left_unread(guest, 7)
            await until_reset(guest)
            await left_unread(guest, 8)
            await until_reset(guest)
            while guest.counter("connections") > 1:
                await settle()
            # The second has what is in its socket.
            came = b""
            while piece := await asyncio.get_running_loop().sock_recv(second, BUFFER_BYTES):
                came += piece
            assert 0 < len(came) < BUFFER_BYTES
            assert sent.startswith(came)
        assert await read(first, BUFFER_BYTES) == sent
        await ended(guest)
        async with joined(guest, tmp_path, 9) as third:
            await left_unread(guest, 9)
            await until_reset(guest)
            assert await read(third, BUFFER_BYTES) == sent


async def test_a_program_that_has_gone_does_not_wait_for_a_guest_that_takes_nothing(
    tmp_path: Path, io_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splice, "CLOSE_LIMIT_S", 0.01)
    async with guest_at(tmp_path, io_threads) as guest:
        guest.buf_alloc = 4
        async with joined(guest, tmp_path) as program:
            program.send(b"takenleft")
        _, payload = await guest.expect(Op.RW)
        assert payload == b"take"
        await guest.expect(Op.RST)
        await ended(guest)


async def test_nothing_is_expected_of_a_guest_at_rest(
    tmp_path: Path, io_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splice, "CLOSE_LIMIT_S", 1e-6)
    monkeypatch.setattr(splice, "_LOOKS_A_LIMIT", 1e-9)  # they are made here
    async with guest_at(tmp_path, io_threads) as guest:
        device = guest.rig.device
        guest.buf_alloc = 0
        async with joined(guest, tmp_path) as program:
            program.send(b"takenleft")
        guest.send(Op.CREDIT_UPDATE, PORT, 7, buf_alloc=4)
        await guest.expect(Op.RW)
        await device.quiesce()
        for _ in range(3):
            assert device.splice.expire() == 1
        await device.resume()
        assert device.splice.expire() == 0
        await guest.expect(Op.RST)


async def test_a_guest_that_resets_ends_the_program(tmp_path: Path, io_threads: int) -> None:
    async with guest_at(tmp_path, io_threads) as guest, joined(guest, tmp_path) as program:
        guest.send(Op.RST, PORT, 7)
        assert await asyncio.get_running_loop().sock_recv(program, 1) == b""
        await ended(guest)


@pytest.mark.parametrize(
    ("op", "fields"),
    [
        (Op.CREDIT_UPDATE, {"fwd_cnt": 1}),
        (Op.REQUEST, {}),
        (Op.RESPONSE, {}),
        (Op.INVALID, {}),
        (99, {}),
    ],
)
async def test_a_guest_that_breaks_the_rules_loses_the_connection(
    tmp_path: Path, io_threads: int, op: int, fields: dict[str, int]
) -> None:
    async with guest_at(tmp_path, io_threads) as guest, joined(guest, tmp_path) as program:
        guest.send(op, PORT, 7, **fields)
        await guest.expect(Op.RST)
        assert await asyncio.get_running_loop().sock_recv(program, 1) == b""
        await ended(guest)


async def test_more_than_there_is_room_for_ends_the_connection(
    tmp_path: Path, io_threads: int
) -> None:
    async with guest_at(tmp_path, io_threads) as guest, joined(guest, tmp_path):
        for _ in range(16):
            guest.send(Op.RW, PORT, 7, bytes(64 * 1024))
            while not guest.free_slots:
                await settle()
        while (await guest.packet())[0].op != Op.RST:
            pass


async def test_a_credit_request_is_answered(tmp_path: Path, io_threads: int) -> None:
    async with guest_at(tmp_path, io_threads) as guest, joined(guest, tmp_path) as program:
        guest.send(Op.RW, PORT, 7, b"12345")
        assert await read(program, 5) == b"12345"
        guest.send(Op.CREDIT_REQUEST, PORT, 7)
        header, _ = await guest.expect(Op.CREDIT_UPDATE)
        assert (header.fwd_cnt, header.buf_alloc) == (5, BUFFER_BYTES)


async def test_a_port_that_python_serves_is_not_a_unix_socket(
    tmp_path: Path, io_threads: int
) -> None:
    taken = asyncio.Event()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken.set()
        await reader.read()
        writer.close()

    async with guest_at(tmp_path, io_threads) as guest, listening(tmp_path) as server:
        async with await guest.host.serve(PORT, take):
            guest.send(Op.REQUEST, PORT, 7)
            await guest.expect(Op.RESPONSE)
            await taken.wait()
            guest.send(Op.RST, PORT, 7)
        guest.send(Op.REQUEST, PORT, 8)
        await guest.expect(Op.RESPONSE)
        server.accept()[0].close()


async def test_a_guest_that_does_not_close_is_reset(
    tmp_path: Path, io_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splice, "CLOSE_LIMIT_S", 0.01)
    async with guest_at(tmp_path, io_threads) as guest:
        async with joined(guest, tmp_path):
            pass
        await guest.expect(Op.SHUTDOWN)
        await guest.expect(Op.RST)
        await ended(guest)


@pytest.mark.parametrize("driver", [False, True])
async def test_a_guest_that_does_not_answer_ends_the_program(
    tmp_path: Path, io_threads: int, monkeypatch: pytest.MonkeyPatch, driver: bool
) -> None:
    monkeypatch.setattr(splice, "ASK_LIMIT_S", 0.01)
    async with guest_at(tmp_path, io_threads, start=driver) as guest:
        reader, writer = await asyncio.open_unix_connection(tmp_path / "v")
        writer.write(b"CONNECT 9\n")
        assert await reader.read() == b""
        if driver:
            await guest.expect(Op.REQUEST)
            await guest.expect(Op.RST)
        await ended(guest)
        writer.close()


async def test_a_program_that_leaves_before_the_answer_is_reset(
    tmp_path: Path, io_threads: int
) -> None:
    async with guest_at(tmp_path, io_threads) as guest:
        _, writer = await asyncio.open_unix_connection(tmp_path / "v")
        writer.write(b"CONNECT 9\n")
        header, _ = await guest.expect(Op.REQUEST)
        writer.close()
        await guest.expect(Op.RST)
        await ended(guest)
        assert header.dst_port == 9


async def test_a_reset_of_the_driver_ends_the_programs(tmp_path: Path, io_threads: int) -> None:
    async with guest_at(tmp_path, io_threads) as guest:
        async with joined(guest, tmp_path) as program:
            await guest.restart()
            assert await asyncio.get_running_loop().sock_recv(program, 1) == b""
            assert guest.counter("connections") == 0
        async with joined(guest, tmp_path):
            pass


async def test_nothing_moves_at_rest_and_nothing_is_lost(tmp_path: Path, io_threads: int) -> None:
    async with guest_at(tmp_path, io_threads) as guest, joined(guest, tmp_path) as program:
        await guest.rig.device.quiesce()
        program.send(b"waits")
        guest.send(Op.RW, PORT, 7, b"waits too")
        await settle()
        assert not guest.has_packet()
        with pytest.raises(BlockingIOError):
            program.recv(1)
        await guest.rig.device.resume()
        assert await guest.receive(5) == b"waits"
        assert await read(program, 9) == b"waits too"


async def test_many_connections_share_the_ring(tmp_path: Path, io_threads: int) -> None:
    count = 100
    async with guest_at(tmp_path, io_threads) as guest, listening(tmp_path) as server:
        programs = []
        for port in range(count):
            guest.send(Op.REQUEST, PORT, port)
            await guest.expect(Op.RESPONSE)
            programs.append(server.accept()[0])
        for port, program in enumerate(programs):
            program.send(b"%d" % port)
        came = {}
        while len(came) < count:
            header, payload = await guest.expect(Op.RW)
            came[header.dst_port] = payload
        assert came == {port: b"%d" % port for port in range(count)}
        for port, program in enumerate(programs):
            guest.send(Op.SHUTDOWN, PORT, port, flags=SHUTDOWN_BOTH)
            await guest.expect(Op.RST)
            program.close()
        await ended(guest)
        assert guest.counter("opened") == count


async def test_a_guest_that_asks_when_there_is_no_descriptor_is_refused(
    tmp_path: Path, io_threads: int
) -> None:
    async with guest_at(tmp_path, io_threads) as guest, listening(tmp_path) as server:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (server.fileno(), hard))
        try:
            with pytest.raises(OSError, match=rf"Errno {errno.EMFILE}"):
                server.dup()
            guest.send(Op.REQUEST, PORT, 7)
            await guest.expect(Op.RST)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert guest.counter("refused") == 1
        guest.send(Op.REQUEST, PORT, 7)
        await guest.expect(Op.RESPONSE)
