"""Packets and their headers (virtio 1.3 sections 5.1.6.2 to 5.1.6.4).

What comes from the network is put into the place of a TAP, so that it may be anything. What a guest
sends goes to another one, through the device's own segmentation and checksums.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest

from avmm.hostnet.switch import Switch
from avmm.virtio import features
from avmm.virtio.devices.net import RX
from avmm.virtio.devices.nic import Nic
from fakes.driver_queue import Segment
from fakes.frames import GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, VNET, tcp_frame, total, vnet
from fakes.frames import frame as plain_frame
from fakes.mmio_driver import settle
from fakes.net_rig import HEADER, RX_GPA, NicRig, Plugged, net_rig, nic_rig

Rigged = Callable[..., Any]
Accepting = Callable[[int], int]
Guests = Callable[..., AbstractAsyncContextManager[tuple[NicRig, NicRig]]]

NEEDS_CSUM, DATA_VALID, RSC_INFO = 1, 2, 4
GSO_UDP, GSO_UDP_L4 = 3, 5
GUEST_ALL = (
    features.NET_GUEST_CSUM
    | features.NET_GUEST_TSO
    | features.NET_GUEST_ECN
    | features.NET_GUEST_USO
    | features.NET_MRG_RXBUF
)
TCP_AT = 34


@pytest.fixture
def plugged(rigged: Rigged) -> Plugged:
    return functools.partial(net_rig, 0, rigged=rigged)


@pytest.fixture
def guests(rigged: Rigged) -> Guests:
    """A guest that sends, and one that receives and accepts these features (None: all)."""

    @asynccontextmanager
    async def guests(accept: int | None = None) -> AsyncIterator[tuple[NicRig, NicRig]]:
        one, other = Nic(), Nic()
        with Switch() as switch:
            switch.attach(one)
            switch.attach(other)
            async with (
                nic_rig(one, rigged=rigged) as sender,
                nic_rig(other, accept=accept, rigged=rigged) as receiver,
            ):
                receiver.offer_rx(8, size_bytes=8192)
                yield sender, receiver

    return guests


async def received(net: NicRig) -> tuple[tuple[int, ...], bytes]:
    """The fields of the next packet's header, and the frame."""
    (packet,) = await net.received()
    return VNET.unpack(packet[:12]), packet[12:]


# --- 5.1.6.2.2, transmission


@pytest.mark.spec("5.1.6.2.2", "ignore flags in the header that it does not recognize")
@pytest.mark.parametrize("flag", [1 << bit for bit in range(3, 8)])
async def test_unknown_flags_change_nothing(guests: Guests, flag: int) -> None:
    data = tcp_frame(b"payload", complete=True)
    async with guests() as (sender, receiver):
        sender.send(data, header=vnet(flags=flag))
        assert await received(receiver) == ((0, 0, 0, 0, 0, 0, 1), data)
        sender.send(tcp_frame(b"payload"), header=vnet(flags=NEEDS_CSUM | flag))
        header, partial = await received(receiver)
        assert header == (NEEDS_CSUM, 0, 0, 0, TCP_AT, 16, 1)
        assert partial == tcp_frame(b"payload")


@pytest.mark.spec("5.1.6.2.2", "not use csum_start and csum_offset without NEEDS_CSUM")
@pytest.mark.parametrize(("start", "offset"), [(34, 16), (0, 0), (0xFFFF, 0xFFFF)])
async def test_without_needs_csum_a_frame_goes_as_it_is(
    rigged: Rigged, guests: Guests, start: int, offset: int
) -> None:
    data = tcp_frame(b"payload")  # a checksum would be filled in
    header = vnet(flags=0, start=start, offset=offset)
    nic = Nic()
    async with nic_rig(nic, rigged=rigged) as net:  # for Python, which takes complete frames only
        net.send(data, header=header)
        assert await nic.receive() == data
    async with guests() as (sender, receiver):
        sender.send(data, header=header)
        assert await received(receiver) == ((0, 0, 0, 0, 0, 0, 1), data)


@pytest.mark.spec("5.1.6.2.2", "not rely on hdr_len, without GUEST_HDRLEN")
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("header_bytes", [0, 1, 66, 1000, 0xFFFF])
async def test_segments_do_not_depend_on_hdr_len(
    rigged: Rigged, version: int, header_bytes: int
) -> None:
    payload = bytes(n % 251 for n in range(3000))
    gso, start = (GSO_TCPV4, 34) if version == 4 else (GSO_TCPV6, 54)
    header = vnet(gso=gso, segment_bytes=1400, start=start, header_bytes=header_bytes)
    nic = Nic()
    async with nic_rig(nic, rigged=rigged) as net:
        net.send(tcp_frame(payload, version=version), header=header)
        frames: list[bytes] = []
        while len(frames) < 3:
            frames += await nic.receive_many()
        behind = start + 32
        assert b"".join(frame[behind:] for frame in frames) == payload
        assert [len(frame) - behind for frame in frames] == [1400, 1400, 200]


@pytest.mark.spec("5.1.6.2.2", "not rely on a packet's checksum without NEEDS_CSUM")
@pytest.mark.spec(
    "5.1.6.4.1", "set DATA_VALID, where GUEST_CSUM is negotiated, only for a checksum it validated"
)
@pytest.mark.parametrize("flags", [0, DATA_VALID])
async def test_a_wrong_checksum_is_neither_mended_nor_vouched_for(
    guests: Guests, flags: int
) -> None:
    data = bytearray(tcp_frame(b"payload", complete=True))
    data[TCP_AT + 16] ^= 0xFF
    async with guests() as (sender, receiver):
        sender.send(bytes(data), header=vnet(flags=flags))
        assert await received(receiver) == ((0, 0, 0, 0, 0, 0, 1), data)


# --- 5.1.6.3.2 and 5.1.6.4.1: buffers


@pytest.mark.spec("5.1.6.3.2", "set num_buffers to the number of buffers used for the packet")
@pytest.mark.spec(
    "5.1.6.4.1", "set num_buffers to that number, the header's counted, with MRG_RXBUF"
)
@pytest.mark.spec("5.1.6.4.1", "use all of a packet's buffers but the last one completely")
@pytest.mark.parametrize("size", [14, 2036, 2037, 5000, 30_000])
async def test_a_packet_is_spread_over_whole_buffers(plugged: Plugged, size: int) -> None:
    frame = os.urandom(size)
    count = (12 + size + 2047) // 2048
    async with plugged() as net:
        net.offer_rx(32)
        net.tap.wire.send(HEADER + frame)
        used = await net.rig.driver.used(RX, count)
        assert [written for _, written in used] == [
            *[2048] * (count - 1),
            12 + size - 2048 * (count - 1),
        ]
        packet = b"".join(net.rig.memory.read(net.buffers[0, h], n) for h, n in used)
        assert int.from_bytes(packet[10:12], "little") == count
        assert packet[12:] == frame


@pytest.mark.spec("5.1.6.3.2", "use a single buffer for a packet, without MRG_RXBUF")
@pytest.mark.spec("5.1.6.4.1", "set num_buffers to 1, without MRG_RXBUF")
async def test_without_merging_a_packet_has_one_buffer(
    plugged: Plugged, accepting: Accepting
) -> None:
    async with plugged(accepting(0)) as net:
        queue = net.rig.driver.queues[RX]
        for at in range(4):  # of three pieces each, 1536 bytes
            gpa = RX_GPA + 2048 * at
            queue.offer(*(Segment(gpa + 512 * i, 512, writable=True) for i in range(3)))
        net.rig.driver.kick(RX)
        large, fits, small = os.urandom(1525), os.urandom(1524), os.urandom(60)
        for frame in (large, fits, small):
            net.tap.wire.send(HEADER + frame)
        used = await net.rig.driver.used(RX, 2)
        assert [written for _, written in used] == [1536, 72]
        for at, frame in enumerate((fits, small)):
            packet = net.rig.memory.read(RX_GPA + 2048 * at, 12 + len(frame))
            assert packet[10:12] == b"\1\0"
            assert packet[12:] == frame
        await settle()
        assert queue.take_used() == []
        assert net.counter("rx_dropped") == 1


@pytest.mark.spec("5.1.6.4.1", "show all the buffers of a packet as used together")
async def test_a_packet_is_never_seen_in_part(rigged: Rigged) -> None:
    rounds = 60
    async with net_rig(1, rigged=rigged) as net:
        driver = net.rig.driver
        for _ in range(rounds):
            queue = driver.queues[RX]
            net.offer_rx(9, size_bytes=512)
            for size in (1400, 900, 1400):  # three, two and three buffers
                net.tap.wire.send(HEADER + bytes(size))
            left = 8
            while left:
                # Whatever is there at this moment, while a thread fills in more.
                shown = queue.take_used()
                at = 0
                while at < len(shown):
                    head = net.rig.memory.read(net.buffers[0, shown[at][0]], 12)
                    at += int.from_bytes(head[10:12], "little")
                assert at == len(shown)
                left -= len(shown)
                await asyncio.sleep(0)
            await driver.start(driver.negotiated)


# --- 5.1.6.4.1: headers of what is received


@pytest.mark.spec("5.1.6.4.1", "set flags to zero, without GUEST_CSUM")
async def test_without_guest_csum_there_are_no_flags(
    plugged: Plugged, accepting: Accepting
) -> None:
    frame = tcp_frame(b"payload", complete=True)
    async with plugged(accepting(0)) as net:
        net.offer_rx(8)
        net.tap.wire.send(vnet(flags=DATA_VALID, start=0, offset=0) + frame)
        net.tap.wire.send(vnet(flags=NEEDS_CSUM) + tcp_frame(b"payload"))
        net.tap.wire.send(HEADER + frame)
        for _ in range(2):  # what lacks its checksum is nothing for this driver
            packet = await net.packet()
            assert packet[0] == 0
            assert packet[12:] == frame
        assert net.counter("rx_dropped") == 1
    async with plugged(accepting(features.NET_GUEST_CSUM)) as net:
        net.offer_rx(8)
        for flag in (DATA_VALID, NEEDS_CSUM):
            net.tap.wire.send(vnet(flags=flag) + frame)
            assert (await net.packet())[0] == flag


@pytest.mark.spec("5.1.6.4.1", "not set RSC_INFO, without RSC_EXT")
async def test_coalesced_segments_are_not_reported(plugged: Plugged) -> None:
    async with plugged() as net:
        net.offer_rx(8)
        net.tap.wire.send(vnet(flags=NEEDS_CSUM | RSC_INFO | 0xF8) + tcp_frame(b"payload"))
        assert (await net.packet())[0] == NEEDS_CSUM


@pytest.mark.parametrize(
    ("gso", "feature"),
    [
        pytest.param(
            GSO_TCPV4,
            features.NET_GUEST_TSO4,
            marks=pytest.mark.spec("5.1.6.4.1", "not set gso_type to TCPV4, without GUEST_TSO4"),
        ),
        pytest.param(
            GSO_TCPV6,
            features.NET_GUEST_TSO6,
            marks=pytest.mark.spec("5.1.6.4.1", "not set gso_type to TCPV6, without GUEST_TSO6"),
        ),
        pytest.param(
            GSO_UDP_L4,
            features.NET_GUEST_USO,
            marks=pytest.mark.spec(
                "5.1.6.4.1", "not set gso_type to UDP_L4, without GUEST_USO4 and GUEST_USO6"
            ),
        ),
        pytest.param(
            GSO_UDP,
            0,
            marks=pytest.mark.spec("5.1.6.4.1", "not set gso_type to UDP, without GUEST_UFO"),
        ),
    ],
)
async def test_no_driver_gets_segments_that_it_does_not_take(
    plugged: Plugged, accepting: Accepting, gso: int, feature: int
) -> None:
    packet = vnet(gso=gso, segment_bytes=1000) + tcp_frame(bytes(2500))
    async with plugged(accepting(GUEST_ALL & ~feature), uso=True) as net:
        net.offer_rx(16, size_bytes=4096)
        net.tap.wire.send(packet)
        net.tap.wire.send(HEADER + b"the next one")
        assert (await net.packet())[12:] == b"the next one"
        assert net.counter("rx_dropped") == 1
    async with plugged(accepting(GUEST_ALL), uso=True) as net:
        net.offer_rx(16, size_bytes=4096)
        net.tap.wire.send(packet)
        net.tap.wire.send(HEADER + b"the next one")
        assert (await net.packet())[1] == (gso if feature else GSO_NONE)


@pytest.mark.spec("5.1.6.4.1", "set gso_type to NONE, without any of GUEST_TSO, UFO and USO")
async def test_without_any_of_them_frames_are_ordinary(
    plugged: Plugged, accepting: Accepting
) -> None:
    accept = accepting(features.NET_GUEST_CSUM | features.NET_MRG_RXBUF)
    async with plugged(accept) as net:
        net.offer_rx(16, size_bytes=4096)
        for gso in range(1, 256):
            net.tap.wire.send(vnet(gso=gso, segment_bytes=1000) + tcp_frame(bytes(1000)))
            if gso % 32 == 0:
                await settle()
        net.tap.wire.send(vnet() + tcp_frame(bytes(1000)))
        packet = await net.packet()
        assert VNET.unpack(packet[:12]) == (NEEDS_CSUM, GSO_NONE, 0, 0, TCP_AT, 16, 1)
        assert net.counter("rx_dropped") == 255


@pytest.mark.spec("5.1.6.4.1", "set NEEDS_CSUM and gso_size with a gso_type other than NONE")
@pytest.mark.spec("5.1.6.4.1", "set GSO_ECN for segments with ECN, where GUEST_ECN is negotiated")
@pytest.mark.parametrize("ecn", [0, GSO_ECN])
@pytest.mark.parametrize("version", [4, 6])
async def test_a_large_frame_says_how_to_segment_it(guests: Guests, version: int, ecn: int) -> None:
    gso, start = (GSO_TCPV4, 34) if version == 4 else (GSO_TCPV6, 54)
    data = tcp_frame(bytes(3000), version=version)
    async with guests() as (sender, receiver):
        sender.send(data, header=vnet(gso=gso | ecn, segment_bytes=1400, start=start))
        header, arrived = await received(receiver)
        assert arrived == data
        flags, gso_type, header_bytes, gso_bytes, csum_start, csum_offset, _ = header
        assert flags == NEEDS_CSUM
        assert gso_type == gso | ecn
        assert gso_bytes == 1400
        assert header_bytes == start + 32
        assert (csum_start, csum_offset) == (start, 16)


@pytest.mark.spec("5.1.6.4.1", "set the checksum, with NEEDS_CSUM, to that of the pseudo header")
@pytest.mark.spec(
    "5.1.6.4.1",
    "set csum_start and csum_offset, with NEEDS_CSUM, so that the sum from there completes it",
)
@pytest.mark.parametrize("version", [4, 6])
async def test_what_is_told_of_a_checksum_completes_it(guests: Guests, version: int) -> None:
    start = 34 if version == 4 else 54
    async with guests() as (sender, receiver):
        sender.send(tcp_frame(b"payload", version=version), header=vnet(start=start))
        header, data = await received(receiver)
    flags, *_, csum_start, csum_offset, _ = header
    assert flags == NEEDS_CSUM
    assert data == tcp_frame(b"payload", version=version)  # which has the pseudo header's
    value = (total(data[csum_start:]) ^ 0xFFFF).to_bytes(2, "big")
    at = csum_start + csum_offset
    complete = data[:at] + value + data[at + 2 :]
    assert complete == tcp_frame(b"payload", version=version, complete=True)


async def test_a_guest_that_takes_no_partial_checksum_gets_it_complete(
    guests: Guests, accepting: Accepting
) -> None:
    async with guests(accepting(0)) as (sender, receiver):
        sender.send(tcp_frame(b"payload"), header=vnet())
        complete = tcp_frame(b"payload", complete=True)
        assert await received(receiver) == ((0, 0, 0, 0, 0, 0, 1), complete)
        sender.send(plain_frame())
        assert await received(receiver) == ((0, 0, 0, 0, 0, 0, 1), plain_frame())
