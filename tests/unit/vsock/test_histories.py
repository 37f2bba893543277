"""Random histories: many connections at once of a table with a model of the guest's kernel.

Both ends write, read, close half or whole, abort, stop reading; rings fill up and packets wait.
What is read is what was written, nothing goes beyond its credit, and in the end nothing is left.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

import pytest

from avmm.log import GuestLog
from avmm.vsock.credit import BUFFER_BYTES
from avmm.vsock.host import VsockHost
from avmm.vsock.packet import (
    CID_HOST,
    SHUTDOWN_BOTH,
    SHUTDOWN_SEND,
    TYPE_STREAM,
    Header,
    Op,
)
from avmm.vsock.table import Sent, Table
from avmm.vsock.transport import StreamTransport

CID, PORT = 3, 77
GUEST_BUFFER_BYTES = 20_000
ROUNDS = 400


_PERIOD = 1 << 16
_PATTERN = bytes((i * 7 + (i >> 8)) & 0xFF for i in range(2 * _PERIOD))


def stream(seed: int, at: int, count: int) -> bytes:
    """A piece, 64 KiB at most, of the bytes that one end of a connection sends."""
    first = (seed * 31 + at) % _PERIOD
    return _PATTERN[first : first + count]


@dataclass
class GuestEnd:
    """A socket of the guest's, as Linux keeps one."""

    host_port: int
    port: int
    open: bool = False
    alloc: int = 0
    host_forwarded: int = 0
    sent: int = 0
    received: int = 0
    read: int = 0
    unread: bytes = b""
    shut: int = 0
    host_shut: int = 0
    gone: bool = False


@dataclass
class Guest:
    """Its kernel and programs. ring: how many packets it takes now."""

    rng: random.Random
    ends: dict[tuple[int, int], GuestEnd] = field(default_factory=dict)
    out: list[tuple[Header, bytes]] = field(default_factory=list)
    ring: int = 0
    next_port: int = 1
    finished: list[GuestEnd] = field(default_factory=list)

    # Ring: what the host puts into it

    def put(self, header: Header, data: memoryview) -> int:
        done = 0
        while done < len(data) and self.ring:
            piece = bytes(data[done : done + 4096])
            self._arrived(header, piece)
            done += len(piece)
        return done

    def put_header(self, header: Header) -> bool:
        if not self.ring:
            return False
        self._arrived(header, b"")
        return True

    def _arrived(self, header: Header, payload: bytes) -> None:
        self.ring -= 1
        assert (header.src_cid, header.dst_cid, header.type) == (CID_HOST, CID, TYPE_STREAM)
        key = header.src_port, header.dst_port
        end = self.ends.get(key)
        if header.op == Op.REQUEST:
            assert end is None
            end = self.ends[key] = GuestEnd(*key, open=True)
            self.send(end, Op.RESPONSE)
        elif end is None:
            assert header.op in (Op.RST, Op.CREDIT_UPDATE, Op.RW, Op.SHUTDOWN)
            return
        if header.op != Op.RST:
            end.alloc, end.host_forwarded = header.buf_alloc, header.fwd_cnt
            assert end.alloc == BUFFER_BYTES
            assert end.sent - end.host_forwarded >= 0
        if header.op == Op.RESPONSE:
            end.open = True
        elif header.op == Op.RW:
            assert not end.host_shut & SHUTDOWN_SEND
            assert payload == stream(end.port, end.received, len(payload))
            end.received += len(payload)
            end.unread += payload
            assert len(end.unread) <= GUEST_BUFFER_BYTES
        elif header.op == Op.SHUTDOWN:
            end.host_shut |= header.flags
            if end.host_shut == SHUTDOWN_BOTH:
                self.end(end)
        elif header.op == Op.RST:
            self.drop(end)

    # What its programs do

    def connect(self) -> None:
        end = GuestEnd(PORT, self.next_port)
        self.next_port += 1
        self.ends[PORT, end.port] = end
        self.send(end, Op.REQUEST)

    def send(self, end: GuestEnd, op: Op, payload: bytes = b"", flags: int = 0) -> None:
        header = Header(
            *(CID, CID_HOST, end.port, end.host_port, len(payload), TYPE_STREAM, op, flags),
            *(GUEST_BUFFER_BYTES, end.read),
        )
        self.out.append((header, payload))

    def act(self, end: GuestEnd) -> None:
        step = self.rng.randrange(20)
        if step < 8:
            count = self.rng.randrange(len(end.unread) + 1)
            end.unread = end.unread[count:]
            end.read += count
            self.send(end, Op.CREDIT_UPDATE)
        elif step < 17:
            room = end.alloc - (end.sent - end.host_forwarded)
            if end.open and not end.shut and room > 0:
                count = self.rng.randrange(1, min(room, 65536) + 1)
                self.send(end, Op.RW, stream(end.port + 1, end.sent, count))
                end.sent += count
        elif step == 17 and end.open:
            end.shut |= SHUTDOWN_SEND
            self.send(end, Op.SHUTDOWN, flags=end.shut)
        elif step == 18 and end.open and self.rng.random() < 0.3:
            self.send(end, Op.SHUTDOWN, flags=SHUTDOWN_BOTH)
            end.shut = SHUTDOWN_BOTH
        elif step == 19 and end.open and self.rng.random() < 0.1:
            self.end(end)

    def end(self, end: GuestEnd) -> None:
        self.send(end, Op.RST)
        self.drop(end)

    def drop(self, end: GuestEnd) -> None:
        end.gone = True
        self.finished.append(self.ends.pop((end.host_port, end.port)))


class HostEnd(asyncio.Protocol):
    """A program of the host's. seed: of what it reads."""

    def __init__(self, ends: list[HostEnd]) -> None:
        self.transport: StreamTransport | None = None
        self.received = self.written = 0
        self.port = 0
        self.may_write = True
        self.eof = self.lost = self.wrote_eof = False
        ends.append(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, StreamTransport)
        self.transport = transport
        self.port = transport.get_extra_info("peername")[1]

    def data_received(self, data: bytes) -> None:
        assert not self.eof
        assert not self.lost
        assert data == stream(self.port + 1, self.received, len(data))
        self.received += len(data)

    def eof_received(self) -> bool:
        assert not self.eof
        self.eof = True
        return True

    def connection_lost(self, error: Exception | None) -> None:
        assert not self.lost
        self.lost = True

    def pause_writing(self) -> None:
        assert self.may_write
        self.may_write = False

    def resume_writing(self) -> None:
        assert not self.may_write
        self.may_write = True

    def act(self, rng: random.Random) -> None:
        transport = self.transport
        if transport is None or self.lost:
            return
        step = rng.randrange(40)
        if step < 20:
            if self.may_write and not self.wrote_eof and not transport.is_closing():
                data = stream(self.port, self.written, rng.randrange(1, 30_000))
                transport.write(data)
                self.written += len(data)
        elif step < 27:
            transport.pause_reading()
        elif step < 35:
            transport.resume_reading()
        elif step < 37 and not transport.is_closing():
            transport.write_eof()
            self.wrote_eof = True
        elif step == 38:
            transport.close()
        elif step == 39 and rng.random() < 0.3:
            transport.abort()


def check_whole(guest: Guest, ends: list[HostEnd]) -> None:
    """An end that was announced came after all that was before it."""
    others = {(end.host_port, end.port): end for end in guest.finished}
    told = 0
    for program in ends:
        if program.transport is None:
            continue
        end = others[program.transport.get_extra_info("sockname")[1], program.port]
        if program.eof:
            assert program.received == end.sent
            told += 1
        if end.host_shut == SHUTDOWN_BOTH:
            assert end.received == program.written
            told += 1
    assert told > len(ends) // 2


@pytest.mark.parametrize("seed", range(12))
async def test_connections_at_once_are_what_they_would_be_alone(seed: int) -> None:
    rng = random.Random(seed)
    loop = asyncio.get_running_loop()
    guest, ends = Guest(rng), list[HostEnd]()
    host = VsockHost(Table(CID, loop, lambda: None), loop, GuestLog())
    host.create_server(lambda: HostEnd(ends), PORT)
    connecting: set[asyncio.Task[object]] = set()

    def exchange(room: int) -> None:
        guest.ring = room
        taken = guest.out[: rng.randrange(1, 30)]
        del guest.out[: len(taken)]
        headers = [header for header, _ in taken]
        host.table.receive(headers, memoryview(b"".join(data for _, data in taken)))
        while host.table.send(guest) is Sent.MORE:
            pass

    for turn in range(ROUNDS):
        if turn < ROUNDS * 3 // 4 and rng.random() < 0.3:
            if rng.random() < 0.5:
                guest.connect()
            else:
                make = host.create_connection(lambda: HostEnd(ends), 1000 + turn)
                connecting.add(asyncio.ensure_future(make))
        for end in tuple(guest.ends.values()):
            guest.act(end)
        for program in ends:
            program.act(rng)
        exchange(rng.choice((0, 1, 3, 20)))
        await asyncio.sleep(0)

    # All close; what was on its way comes to its end.
    for program in ends:
        if program.transport is not None:
            program.transport.resume_reading()
            program.transport.close()
    for _ in range(3000):
        for end in tuple(guest.ends.values()):
            end.read, end.unread = end.received, b""
            guest.send(end, Op.CREDIT_UPDATE)
        exchange(50)
        await asyncio.sleep(0)
        if not guest.ends and not guest.out and not len(host.table):
            break
    assert len(host.table) == 0
    assert not guest.ends
    await asyncio.gather(*connecting, return_exceptions=True)
    assert len(guest.finished) > 20
    assert all(program.lost for program in ends if program.transport is not None)
    check_whole(guest, ends)
    assert host.table.counters.strayed < len(guest.finished) * 40
    await host.close()
