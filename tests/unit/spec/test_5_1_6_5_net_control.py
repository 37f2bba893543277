"""The network device's control queue (virtio 1.3 section 5.1.6.5): what it must do for a driver."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from avmm.virtio import features
from avmm.virtio.chain import ChainQueue
from avmm.virtio.devices.net_control import RxFlag
from avmm.virtio.interrupt import CONFIG_CHANGE
from fakes.mmio_driver import settle
from fakes.net_commands import (
    ANNOUNCE_ACK,
    BROADCAST,
    GROUP,
    MAC,
    OTHER,
    PROMISC_OFF,
    frame,
    mac_address,
    mac_table,
    rx_mode,
    use_pairs,
    vlan,
)
from fakes.net_rig import HEADER, Net, Plugged, net_rig
from fakes.network_namespace import can_make_taps, output

Rigged = Callable[..., Any]
Accepting = Callable[[int], int]
T = TypeVar("T")

OK = 0
MAC_AT, STATUS_AT = 0, 6
LINK_UP, ANNOUNCE = 1, 2
FILTERS = features.NET_CTRL_VQ | features.NET_CTRL_RX


@pytest.fixture
def plugged(rigged: Rigged) -> Plugged:
    return functools.partial(net_rig, 0, rigged=rigged, mac=MAC.hex(":"))


@pytest.fixture
def threaded(rigged: Rigged) -> Plugged:
    """Packets are moved by a thread, whatever the loop is about."""
    return functools.partial(net_rig, 1, rigged=rigged, mac=MAC.hex(":"))


def seen_before(monkeypatch: pytest.MonkeyPatch, command: Callable[[], T], into: list[T]) -> None:
    """Look at something each time the device is about to use a command's buffer: what a driver on
    another vCPU would find that sees it used at once."""
    answer = ChainQueue.answer

    def look_first(queue: ChainQueue, *arguments: Any) -> None:
        into.append(command())
        answer(queue, *arguments)

    monkeypatch.setattr(ChainQueue, "answer", look_first)


async def passes(net: Net, data: bytes, *, marker: bytes) -> bool:
    """Whether a frame reaches the driver; the marker, sent behind it, always does."""
    for each in (data, marker):
        net.tap.wire.send(HEADER + each)
    first = await net.received()
    if first == marker:
        return False
    assert first == data
    assert await net.received() == marker
    return True


# --- 5.1.6.5.1.1, packet receive filtering

SUPPORTS = "support the commands PROMISC and ALLMULTI, with CTRL_RX"
SUPPORTS_EXTRA = "support the commands ALLUNI, NOMULTI, NOUNI and NOBCAST, with CTRL_RX_EXTRA"


@pytest.mark.parametrize(
    ("flag", "before", "to", "wanted"),
    [
        pytest.param(*case, marks=pytest.mark.spec("5.1.6.5.1.1", SUPPORTS))
        for case in (
            (RxFlag.PROMISC, [], OTHER, True),
            (RxFlag.PROMISC, [rx_mode(RxFlag.ALLMULTI, 0)], GROUP, True),
            (RxFlag.ALLMULTI, [PROMISC_OFF], GROUP, True),
        )
    ]
    + [
        pytest.param(*case, marks=pytest.mark.spec("5.1.6.5.1.1", SUPPORTS_EXTRA))
        for case in (
            (RxFlag.ALLUNI, [PROMISC_OFF], OTHER, True),
            (RxFlag.NOMULTI, [PROMISC_OFF, rx_mode(RxFlag.ALLMULTI, 1)], GROUP, False),
            (RxFlag.NOUNI, [PROMISC_OFF, rx_mode(RxFlag.ALLUNI, 1)], MAC, False),
            (RxFlag.NOBCAST, [PROMISC_OFF, rx_mode(RxFlag.ALLMULTI, 1)], BROADCAST, False),
        )
    ],
)
async def test_a_receive_mode_is_switched_on_and_off(
    plugged: Plugged,
    accepting: Accepting,
    flag: RxFlag,
    before: list[bytes],
    to: bytes,
    wanted: bool,
) -> None:
    extra = 0 if flag in (RxFlag.PROMISC, RxFlag.ALLMULTI) else features.NET_CTRL_RX_EXTRA
    marker = frame(BROADCAST if to == MAC else MAC)
    async with plugged(accepting(FILTERS | extra)) as net:
        net.offer_rx(60)
        for command in before:
            assert await net.control(command) == OK
        for on in (1, 0, 1, 1, 0):
            assert await net.control(rx_mode(flag, on)) == OK
            assert await passes(net, frame(to), marker=marker) == (wanted == bool(on))


# --- 5.1.6.5.2.1, MAC addresses


@pytest.mark.spec("5.1.6.5.2.1", "have an empty MAC filtering table on reset")
async def test_a_reset_empties_the_table(plugged: Plugged, accepting: Accepting) -> None:
    async with plugged(accepting(FILTERS)) as net:
        for _ in range(2):
            net.offer_rx(60)
            assert await net.control(PROMISC_OFF) == OK
            for to in (OTHER, GROUP):
                assert not await passes(net, frame(to), marker=frame(MAC))
            assert await net.control(mac_table([OTHER], [GROUP])) == OK
            for to in (OTHER, GROUP):
                assert await passes(net, frame(to), marker=frame(MAC))
            await net.rig.driver.start(net.rig.driver.negotiated)


@pytest.mark.spec("5.1.6.5.2.1", "change the MAC filtering table before it uses the command for it")
async def test_a_table_holds_once_its_command_is_used(
    threaded: Plugged, accepting: Accepting
) -> None:
    tables = itertools.cycle(
        [([OTHER], [GROUP]), ([], [GROUP]), ([OTHER], []), ([], []), ([MAC, OTHER], [GROUP] * 9)]
    )
    async with threaded(accepting(FILTERS)) as net:
        net.offer_rx(60)
        assert await net.control(PROMISC_OFF) == OK
        for unicast, multicast in itertools.islice(tables, 10):
            assert await net.control(mac_table(unicast, multicast)) == OK
            for to in (OTHER, GROUP):
                wanted = to in unicast + multicast
                assert await passes(net, frame(to), marker=frame(MAC)) == wanted


@pytest.mark.spec(
    "5.1.6.5.2.1", "change `mac` before it uses the command MAC_ADDR_SET, with MAC negotiated"
)
async def test_an_address_is_in_the_configuration_once_its_command_is_used(
    plugged: Plugged, accepting: Accepting, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept = features.NET_MAC | features.NET_CTRL_VQ | features.NET_CTRL_MAC_ADDR
    seen: list[bytes] = []
    async with plugged(accepting(accept)) as net:

        def mac() -> bytes:
            return bytes(net.rig.driver.read_config(MAC_AT + at, 1) for at in range(6))

        seen_before(monkeypatch, mac, seen)
        assert mac() == MAC
        wanted = [OTHER, MAC, bytes.fromhex("02fffefdfcfb")]
        for address in wanted:
            assert await net.control(mac_address(address)) == OK
            assert mac() == address
        assert seen == wanted


# --- 5.1.6.5.3.1, VLANs

VLANS = (0, 1, 7, 4095)


@pytest.mark.spec("5.1.6.5.3.1", "accept all tagged packets, without CTRL_VLAN")
async def test_without_a_vlan_filter_every_tag_passes(
    plugged: Plugged, accepting: Accepting
) -> None:
    async with plugged(accepting(FILTERS)) as net:
        net.offer_rx(60)
        for command in (None, PROMISC_OFF):
            assert command is None or await net.control(command) == OK
            for number in VLANS:
                assert await passes(net, frame(MAC, vlan=number), marker=frame(MAC))


@pytest.mark.spec("5.1.6.5.3.1", "accept all packets with a tag in the VLAN table, with CTRL_VLAN")
async def test_the_vlan_filter_passes_what_was_added(
    plugged: Plugged, accepting: Accepting
) -> None:
    accept = accepting(features.NET_CTRL_VQ | features.NET_CTRL_VLAN)
    async with plugged(accept) as net:
        net.offer_rx(60)
        for number in VLANS:
            assert await net.control(vlan(number)) == OK
            for priority in (0, 1, 7):
                tagged = frame(MAC, vlan=priority << 13 | number)
                assert await passes(net, tagged, marker=frame(MAC))
        # No demand: 0 is a priority alone, and passes as a frame without a tag does.
        assert await net.control(vlan(7, add=False)) == OK
        for number in VLANS:
            tagged = frame(MAC, vlan=number)
            assert await passes(net, tagged, marker=frame(MAC)) == (number != 7)


# --- 5.1.6.5.4.2, announcements


@pytest.mark.spec(
    "5.1.6.5.4.2", "clear ANNOUNCE before it uses the command ANNOUNCE_ACK, with GUEST_ANNOUNCE"
)
async def test_an_announcement_is_no_longer_asked_for_once_its_command_is_used(
    plugged: Plugged, accepting: Accepting, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept = features.NET_STATUS | features.NET_CTRL_VQ | features.NET_GUEST_ANNOUNCE
    seen: list[int] = []
    async with plugged(accepting(accept)) as net:
        driver = net.rig.driver

        def status() -> int:
            return driver.read_config(STATUS_AT, 2)

        seen_before(monkeypatch, status, seen)
        for _ in range(2):
            net.rig.device.announce()
            assert await driver.interrupted() & CONFIG_CHANGE
            assert status() == LINK_UP | ANNOUNCE
            assert await net.control(ANNOUNCE_ACK) == OK
            assert status() == LINK_UP
        assert seen == [LINK_UP, LINK_UP]


# --- 5.1.6.5.6, several queues

MULTI_QUEUE = features.NET_CTRL_VQ | features.NET_MQ


@pytest.mark.spec("5.1.6.5.6.2", "queue packets on receiveq1 only, after a reset")
async def test_a_reset_leads_back_to_the_first_queue(
    plugged: Plugged, accepting: Accepting
) -> None:
    async with plugged(accepting(MULTI_QUEUE), pairs=3, size=16) as net:
        driver = net.rig.driver
        for count in (3, 2):
            for pair in range(3):
                net.offer_rx(8, pair=pair)
            assert net.tap.queues[-1] == [True, False, False]
            for pair, wire in enumerate(net.tap.wires):
                wire.send(HEADER + b"for pair %d" % pair)
            assert await net.received(0) == b"for pair 0"
            await settle()
            assert driver.queues[2].take_used() == driver.queues[4].take_used() == []
            assert await net.control(use_pairs(count)) == OK
            for pair in range(1, count):
                assert await net.received(pair) == b"for pair %d" % pair
            await driver.start(driver.negotiated)


@pytest.mark.spec(
    "5.1.6.5.6.2",
    "queue no packet on queues past virtqueue_pairs once it has used the command for it",
)
async def test_queues_that_were_given_up_receive_nothing(
    threaded: Plugged, accepting: Accepting
) -> None:
    async with threaded(accepting(MULTI_QUEUE), pairs=2, size=64) as net:
        driver = net.rig.driver
        second = driver.queues[2]
        net.offer_rx(60)
        net.offer_rx(60, 64, pair=1)
        for _ in range(6):
            assert await net.control(use_pairs(2)) == OK
            assert net.tap.queues[-1] == [True, True]
            for _ in range(9):  # as the thread fills them in
                net.tap.wires[1].send(HEADER + b"for pair 1")
            assert await net.control(use_pairs(1)) == OK
            assert net.tap.queues[-1] == [True, False]
            second.take_used()
            with contextlib.suppress(BlockingIOError):
                net.tap.wires[1].send(HEADER + b"too late")
            # The same thread serves the first pair, so it has seen whatever there is.
            for _ in range(3):
                net.tap.wire.send(HEADER + b"for pair 0")
                assert await net.received() == b"for pair 0"
            assert second.take_used() == []


STEERING = """
    import socket
    from avmm.virtio import features
    from avmm.virtio.devices.net import RX, TX, Tap, build
    from fakes.driver_queue import Segment
    from fakes.net_commands import use_pairs
    from fakes.net_rig import Net
    from fakes.virtio_rig import virtio_rig

    def datagram(source, to):
        head = bytes([0x45, 0, 0, 38, 0, 1, 0, 0, 64, 17, 0, 0, 10, 9, 8, source[0]])
        head += bytes([10, 9, 8, to[0]])
        udp = b"".join(n.to_bytes(2, "big") for n in (source[1], to[1], 18, 0))
        return bytes([2] * 6) + bytes([4] * 6) + b"\\x08\\x00" + head + udp + b"of a flow!"

    accept = features.VERSION_1 | features.NET_CTRL_VQ | features.NET_MQ
    async with virtio_rig(lambda context: build(Tap("avt0", queues=2), context)) as rig:
        await rig.driver.start(accept)
        net = Net(rig, None)
        assert await net.control(use_pairs(2)) == 0
        net.offer_rx(60, pair=0)
        net.offer_rx(60, pair=1)
        flows = {port: port % 2 for port in range(5000, 5016)}
        for port, pair in flows.items():
            net.send(datagram((2, port), (1, 80)), pair=pair)
            await rig.driver.used(2 * pair + TX)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
            s.bind(("avt0", 0))
            for port in flows:
                s.send(datagram((1, 80), (2, port)))
        arrived = {}
        while len(arrived) < len(flows):
            for pair in (0, 1):
                for head, written in rig.driver.queues[2 * pair + RX].take_used():
                    packet = rig.memory.read(net.buffers[pair, head], written)
                    if packet.endswith(b"of a flow!"):
                        arrived[int.from_bytes(packet[48:50], "big")] = pair
            await asyncio.sleep(0)
        print(arrived == flows)
"""


@pytest.mark.skipif(
    not can_make_taps(), reason="no CAP_NET_ADMIN or no /dev/net/tun: TAPs cannot be made"
)
@pytest.mark.spec("5.1.6.5.6", "steer received packets by their flow, with more than one pair")
@pytest.mark.slow
def test_a_flow_comes_by_the_queue_that_it_was_sent_by() -> None:
    assert output(STEERING) == ["True"]
