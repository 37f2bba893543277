"""A NIC over vhost-user: what the front-end does itself, frames, rings that go on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import ClassVar

import pytest

from avmm.vhost_user.message import ProtocolFeature, Request
from avmm.vhost_user.server import VhostUserServer
from avmm.virtio import features
from avmm.virtio.devices.net import CONTROL_FEATURES, NET, NetDevice, Tap
from avmm.virtio.devtype import DeviceContext, DeviceType
from fakes.front_end import FrontEnd, front_end, state
from fakes.net_rig import RX, TX, FakeTap, Net

PAIRS = 2
FRAME = bytes(range(100))


@pytest.fixture
def tap() -> FakeTap:
    return FakeTap(PAIRS)


@pytest.fixture(params=[0, 1], ids=["loop", "thread"])
async def server(
    request: pytest.FixtureRequest, tap: FakeTap, socket_path: str
) -> AsyncIterator[VhostUserServer]:
    async def build(config: Tap, context: DeviceContext) -> NetDevice:
        for wire in tap.wires:
            context.stack.callback(wire.close)
        context.stack.push_async_callback(tap.close)
        return NetDevice(config, tap, context)

    class OnWires(Tap, frozen=True):
        device_type: ClassVar[DeviceType] = replace(NET, build=build)

    async with VhostUserServer(OnWires("avtest0"), socket_path, io_threads=request.param) as server:
        yield server


def nic(end: FrontEnd, tap: FakeTap) -> Net:
    return Net(end, tap)  # type: ignore[arg-type]


async def test_the_control_queue_is_the_front_ends(server: VhostUserServer) -> None:
    async with front_end(server.socket_path) as end:
        offered = await end.ask_u64(Request.GET_FEATURES)
        assert not offered & CONTROL_FEATURES
        assert offered & features.NET_MQ
        assert await end.ask_u64(Request.GET_QUEUE_NUM) == PAIRS
        protocol = await end.ask_u64(Request.GET_PROTOCOL_FEATURES)
        assert not protocol & ProtocolFeature.CONFIG
        end.send(Request.SET_VRING_NUM, state(2 * PAIRS, 64))
        assert await end.closed()


async def test_frames_go_both_ways_on_every_pair(server: VhostUserServer, tap: FakeTap) -> None:
    async with front_end(server.socket_path) as end:
        await end.start(2 * PAIRS)
        net = nic(end, tap)
        for pair in range(PAIRS):
            net.send(FRAME + bytes([pair]), pair=pair)
            assert await tap.sent(pair) == FRAME + bytes([pair])
            net.offer_rx(4, pair=pair)
            tap.wires[pair].send(bytes(12) + FRAME)
            assert await net.received(pair) == FRAME


async def test_one_pair_of_two_may_be_used(server: VhostUserServer, tap: FakeTap) -> None:
    async with front_end(server.socket_path) as end:
        await end.start(2)
        assert tap.queues[-1] == [True, False]
        net = nic(end, tap)
        net.send(FRAME)
        assert await tap.sent() == FRAME


async def test_buffers_that_were_not_filled_come_again(
    server: VhostUserServer, tap: FakeTap
) -> None:
    async with front_end(server.socket_path) as end:
        await end.start(2)
        net = nic(end, tap)
        net.offer_rx(8)
        for at in range(3):
            tap.wire.send(bytes(12) + bytes([at]) * 60)
            assert await net.received() == bytes([at]) * 60
        base = await end.stop_ring(RX)
        assert base & 0x7FFF == 3  # of a packed ring's, the available entry
        await end.start_ring(RX, base)
        for at in range(3, 8):
            tap.wire.send(bytes(12) + bytes([at]) * 60)
            assert await net.received() == bytes([at]) * 60
        net.send(FRAME)
        assert await tap.sent() == FRAME


async def test_a_front_end_that_comes_back(server: VhostUserServer, tap: FakeTap) -> None:
    for _ in range(3):
        async with front_end(server.socket_path) as end:
            await end.start(2)
            net = nic(end, tap)
            net.offer_rx(8)
            tap.wire.send(bytes(12) + FRAME)
            assert await net.received() == FRAME
            net.send(FRAME)
            assert await tap.sent() == FRAME
    assert server.statistics().device.queues[TX].chains == 3
