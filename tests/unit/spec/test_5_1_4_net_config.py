"""What a network device says of itself, and keeps to (virtio 1.3 sections 5.1.3 and 5.1.4)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from avmm.errors import ConfigError
from avmm.virtio import features
from avmm.virtio.devices.net import Tap
from avmm.virtio.devices.nic import Nic
from fakes.frames import GSO_NONE, GSO_TCPV4, VNET, A, B, frame
from fakes.net_rig import HEADER, Plugged, net_rig, nic_rig

Rigged = Callable[..., Any]
Accepting = Callable[[int], int]

MAX_PAIRS, MTU = 8, 10
ETHER_BYTES = 14

NEEDS = {
    features.NET_GUEST_TSO4: features.NET_GUEST_CSUM,
    features.NET_GUEST_TSO6: features.NET_GUEST_CSUM,
    features.NET_GUEST_ECN: features.NET_GUEST_TSO,
    features.NET_GUEST_USO4: features.NET_GUEST_CSUM,
    features.NET_GUEST_USO6: features.NET_GUEST_CSUM,
    features.NET_HOST_TSO4: features.NET_CSUM,
    features.NET_HOST_TSO6: features.NET_CSUM,
    features.NET_HOST_ECN: features.NET_HOST_TSO4 | features.NET_HOST_TSO6,
    features.NET_HOST_USO: features.NET_CSUM,
    features.NET_CTRL_RX: features.NET_CTRL_VQ,
    features.NET_CTRL_VLAN: features.NET_CTRL_VQ,
    features.NET_GUEST_ANNOUNCE: features.NET_CTRL_VQ,
    features.NET_MQ: features.NET_CTRL_VQ,
    features.NET_CTRL_MAC_ADDR: features.NET_CTRL_VQ,
}
"""Any of these (5.1.3.1)."""


@pytest.fixture
def plugged(rigged: Rigged) -> Plugged:
    return functools.partial(net_rig, 0, rigged=rigged)


@pytest.mark.spec("2.2.2", "offer no feature without those it requires")
@pytest.mark.parametrize("options", [{}, {"uso": True, "pairs": 2, "mtu": 9000}], ids=str)
async def test_no_feature_is_offered_without_what_it_needs(
    plugged: Plugged, options: dict[str, Any]
) -> None:
    async with plugged(**options, size=16) as net:
        offered = await net.rig.driver.read_features()
    asked = [feature for feature in NEEDS if offered & feature]
    assert len(asked) >= 10
    assert all(offered & NEEDS[feature] for feature in asked)


@pytest.mark.spec("5.1.4.1", "set `max_virtqueue_pairs` to 1 to 0x8000 if it offers MQ")
@pytest.mark.parametrize("pairs", [2, 64])
async def test_pairs_are_as_many_as_there_are_queues(plugged: Plugged, pairs: int) -> None:
    async with plugged(pairs=pairs, size=16) as net:
        assert await net.rig.driver.read_features() & features.NET_MQ
        assert net.rig.driver.read_config(MAX_PAIRS, 2) == pairs
        assert len(net.rig.driver.queues) == 2 * pairs + 1
        assert 1 <= pairs <= 0x8000


@pytest.mark.spec("5.1.4.1", "set `mtu` to 68 to 65535 if it offers MTU")
async def test_an_mtu_is_one_that_may_be(plugged: Plugged) -> None:
    for mtu in (68, 1500, 65521):
        async with plugged(mtu=mtu) as net:
            assert await net.rig.driver.read_features() & features.NET_MTU
            assert net.rig.driver.read_config(MTU, 2) == mtu
    for mtu in (-1, 0, 67, 65536):
        for make in (functools.partial(Tap, "tap0"), Nic):
            with pytest.raises(ConfigError, match=f"mtu={mtu} is not in 68 to"):
                make(mtu=mtu)


@pytest.mark.spec("5.1.4.1", "not modify `mtu` once it is set")
async def test_an_mtu_stays_what_it_is(plugged: Plugged) -> None:
    async with plugged(mtu=4000) as net:
        driver, device = net.rig.driver, net.rig.device
        assert driver.read_config(MTU, 2) == 4000
        await driver.write_config(MTU, 2, 1500)
        device.set_link(False)
        assert driver.read_config(MTU, 2) == 4000
        device.set_link(True)
        assert await net.control(bytes([1, 1]) + A) == 0
        assert driver.read_config(MTU, 2) == 4000
        await driver.start(driver.negotiated & ~features.NET_MTU)
        assert driver.read_config(MTU, 2) == 4000


def sized(size_bytes: int, *, tagged: bool = False) -> bytes:
    """A frame whose payload behind the Ethernet header has that size."""
    tag = b"\x81\x00\x00\x07" if tagged else b""
    return B + A + tag + b"\x88\xb5" + bytes(size_bytes)


@pytest.mark.spec(
    "5.1.4.1", "pass on no received packet that exceeds `mtu`, if gso_type is NONE, after MTU"
)
@pytest.mark.parametrize("offloads", [0, features.NET_GUEST_CSUM | features.NET_GUEST_TSO4])
async def test_what_exceeds_the_mtu_is_not_received(
    plugged: Plugged, accepting: Accepting, offloads: int
) -> None:
    accept = accepting(features.NET_MTU | features.NET_MRG_RXBUF | offloads)
    async with plugged(accept, mtu=1500) as net:
        net.offer_rx(40, size_bytes=4096)
        for size in (1501, 1505, 2000, 8000):
            net.tap.wire.send(HEADER + sized(size))
            net.tap.wire.send(HEADER + sized(size, tagged=True))
        net.tap.wire.send(HEADER + sized(1500))
        net.tap.wire.send(HEADER + sized(1500, tagged=True))
        assert (await net.packet())[12:] == sized(1500)
        assert (await net.packet())[12:] == sized(1500, tagged=True)
        assert net.counter("rx_dropped") == 8
        if offloads:  # these are larger, and meant to be
            header = VNET.pack(1, GSO_TCPV4, 54, 1400, 34, 16, 0)
            net.tap.wire.send(header + sized(3000))
            assert (await net.packet())[12:] == sized(3000)


async def test_an_mtu_that_was_not_negotiated_limits_nothing(
    plugged: Plugged, accepting: Accepting
) -> None:
    async with plugged(accepting(features.NET_GUEST_CSUM | features.NET_GUEST_TSO4), mtu=1500) as n:
        n.offer_rx(4, size_bytes=4096)
        n.tap.wire.send(HEADER + sized(2000))
        assert (await n.packet())[12:] == sized(2000)


@pytest.mark.spec(
    "5.1.4.1",
    "forward packets of up to `mtu` without fragmentation, if gso_type is NONE, after MTU",
)
@pytest.mark.parametrize("mtu", [68, 1500, 9000, 65521])
async def test_a_packet_as_large_as_the_mtu_is_sent_whole(
    rigged: Rigged, accepting: Accepting, mtu: int
) -> None:
    nic = Nic(mtu=mtu)
    async with nic_rig(nic, accept=accepting(features.NET_MTU), rigged=rigged) as net:
        assert net.rig.driver.read_config(MTU, 2) == mtu
        for size in (mtu - 1, mtu):
            data = frame(payload=bytes(n % 251 for n in range(size)))
            assert len(data) == ETHER_BYTES + size
            net.send(data, header=VNET.pack(0, GSO_NONE, 0, 0, 0, 0, 0))
            assert await nic.receive() == data
