"""The socket device (virtio 1.3 section 5.10)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from avmm.errors import ConfigError
from avmm.virtio.devices.vsock import Vsock, build
from avmm.vsock.credit import BUFFER_BYTES
from avmm.vsock.packet import CID_HOST, SHUTDOWN_BOTH, TYPE_STREAM, Header, Op
from fakes.mmio_driver import eventually, settle
from fakes.vsock_guest import CID, VsockGuest, vsock_guest

Rigged = Callable[..., Any]

PORT, SERVED, NOBODYS = 1024, 5000, 6000
RESERVED_CIDS = (0, 1, 2, 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF)
"""By the table of 5.10.4."""


async def connected(guest: VsockGuest) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, int]:
    """A connection of the host's to PORT; the host's port."""
    connecting = asyncio.ensure_future(guest.host.connect(PORT))
    host_port, _ = await guest.accept()
    return *(await connecting), host_port


# --- 5.10.6.1.2, flow control of the queues


@pytest.mark.spec(
    "5.10.6.1.2", "process the transmit queue while the receive queue is full, as it has room"
)
async def test_a_guest_that_takes_nothing_is_heard(rigged: Rigged) -> None:
    async with vsock_guest(rigged, buffers=2, buffer_bytes=256) as guest:
        reader, writer, host_port = await connected(guest)
        unsent = 8192
        writer.write(bytes(unsent))
        await settle()  # both buffers are full now, and more is to come
        for index in range(7):
            guest.send(Op.RW, host_port, PORT, b"%d" % index)
            guest.send(Op.REQUEST, NOBODYS, index)  # which needs an answer
        assert await reader.readexactly(7) == b"0123456"
        await eventually(lambda: guest.free_slots == 16)
        refused = []
        while unsent or len(refused) < 7:
            header, payload = await guest.packet()
            unsent -= len(payload)
            if header.op == Op.RST:
                refused.append(header.dst_port)
        assert refused == list(range(7))
        writer.close()


# --- 5.10.6.3.2, management of buffer space


@pytest.mark.spec("5.10.6.3.2", "send data only as far as the peer has buffer space for it")
async def test_no_more_is_sent_than_there_is_room_for(rigged: Rigged) -> None:
    async with vsock_guest(rigged) as guest:
        guest.buf_alloc = 1000
        _, writer, host_port = await connected(guest)
        data = bytes(n % 251 for n in range(20_000))
        writer.write(data)
        came = b""
        # What the guest has read in all, the buffer that it says it has, and what it then got.
        for read, room, in_all in (
            (0, 1000, 1000),
            (400, 1000, 1400),
            (1400, 500, 1900),
            (1400, 100, 1900),  # less than is on its way already
            (1850, 10, 1900),
            (1850, 51, 1901),
            (1901, 0, 1901),
            (1901, 0xFFFF_FFFF, len(data)),
        ):
            guest.fwd_cnt[host_port], guest.buf_alloc = read, room
            guest.send(Op.CREDIT_UPDATE, host_port, PORT)
            await settle()
            while guest.has_packet():
                came += (await guest.expect(Op.RW))[1]
                await settle()
            assert len(came) == in_all
        assert came == data
        writer.close()


@pytest.mark.spec("5.10.6.3.2", "have valid `buf_alloc` and `fwd_cnt` in every packet of a flow")
@pytest.mark.parametrize("asks", ["host", "guest"])
async def test_every_packet_says_how_much_room_there_is(rigged: Rigged, asks: str) -> None:
    streams: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        streams.put_nowait((reader, writer))
        await writer.wait_closed()

    headers: list[Header] = []
    sent, least = 0, 0

    async def packet(guest: VsockGuest, op: Op) -> Header:
        nonlocal least
        header, payload = await guest.expect(op)
        guest.fwd_cnt[header.src_port] = guest.fwd_cnt.get(header.src_port, 0) + len(payload)
        headers.append(header)
        assert header.buf_alloc == BUFFER_BYTES
        assert least <= header.fwd_cnt <= sent
        least = header.fwd_cnt
        return header

    async with vsock_guest(rigged) as guest, await guest.host.serve(SERVED, serve):
        if asks == "host":
            connecting = asyncio.ensure_future(guest.host.connect(PORT))
            host_port = (await packet(guest, Op.REQUEST)).src_port
            guest.send(Op.RESPONSE, host_port, PORT)
            reader, writer = await connecting
        else:
            host_port = SERVED
            guest.send(Op.REQUEST, SERVED, PORT)
            await packet(guest, Op.RESPONSE)
            reader, writer = await streams.get()
        for size in (1, 1000, 60_000):
            sent += size
            guest.send(Op.RW, host_port, PORT, bytes(size))
            assert await reader.readexactly(size) == bytes(size)
            writer.write(b"answer")
            assert (await packet(guest, Op.RW)).fwd_cnt == sent
            guest.send(Op.CREDIT_REQUEST, host_port, PORT)
            assert (await packet(guest, Op.CREDIT_UPDATE)).fwd_cnt == sent
        writer.write_eof()
        await packet(guest, Op.SHUTDOWN)
        guest.send(Op.SHUTDOWN, host_port, PORT, flags=SHUTDOWN_BOTH)
        await packet(guest, Op.RST)
        assert len(headers) == 9
        writer.close()


# --- 5.10.6.4.2, reception and transmission


@pytest.mark.spec("5.10.6.4.2", "not have a reserved CID as `guest_cid`")
async def test_a_reserved_cid_is_nobodys(rigged: Rigged) -> None:
    for cid in (*RESERVED_CIDS, -1, 1 << 32, CID | 1 << 40):
        with pytest.raises(ConfigError, match=f"cid {cid} is not in 3 to"):
            Vsock(cid)
    for cid in (3, 4, 0x7FFF_FFFF, 0xFFFF_FFFE):
        config = Vsock(cid)
        async with rigged(lambda context, config=config: build(config, context)) as rig:
            await rig.driver.start()
            assert rig.driver.read_config(0, 4) == cid
            assert rig.driver.read_config(4, 4) == 0


@pytest.mark.spec("5.10.6.4.2", "answer a packet of an unknown type by RST, unless it is one")
@pytest.mark.parametrize("type", [0, 2, 3, 0xFFFF])
@pytest.mark.parametrize("cid", [CID_HOST, 9])
async def test_a_type_that_is_unknown_is_reset(rigged: Rigged, type: int, cid: int) -> None:
    async with vsock_guest(rigged) as guest:
        reader, writer, host_port = await connected(guest)
        for op in (*(op for op in Op if op is not Op.RST), 99, 0xFFFF):
            for port in (host_port, NOBODYS):
                guest.send(op, port, PORT, b"x" * (op == Op.RW), type=type, dst_cid=cid)
                header, payload = await guest.packet()
                assert header[:7] == (cid, CID, port, PORT, 0, type, Op.RST)
                assert payload == b""
        # And the connection between the same ports goes on.
        guest.send(Op.RW, host_port, PORT, b"goes on")
        assert await reader.readexactly(7) == b"goes on"
        writer.write(b"both ways")
        header, payload = await guest.expect(Op.RW)
        assert (header.type, payload) == (TYPE_STREAM, b"both ways")
        writer.close()
