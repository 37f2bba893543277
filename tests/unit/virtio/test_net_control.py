"""The network device's control queue (virtio 1.3 section 5.1.6.5): what a driver may ask for."""

from __future__ import annotations

import functools

import pytest

from avmm.hostnet.tap import OFFLOAD_CSUM, OFFLOAD_TSO4
from avmm.virtio import features
from avmm.virtio.devices.net_control import (
    AnnounceAck,
    Command,
    GuestOffloads,
    MacAddress,
    MacTable,
    PairsInUse,
    RxFlag,
    RxMode,
    Vlan,
    parse,
)
from avmm.virtio.interrupt import CONFIG_CHANGE
from avmm.virtio.state import DEVICE_NEEDS_RESET
from avmm.virtio.transport import mmio
from fakes.driver_queue import Segment
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
    offloads,
    rx_mode,
    use_pairs,
    vlan,
)
from fakes.net_rig import CONTROL_GPA, HEADER, Net, Plugged, net_rig

OK, ERROR = 0, 1
STATUS = mmio.CONFIG + 6
PAIRS_MAX = mmio.CONFIG + 8
LINK_UP, ANNOUNCE = 1, 2


@pytest.fixture(params=[0, 1], ids=["loop", "thread"])
def plugged(request: pytest.FixtureRequest) -> Plugged:
    """net_rig() on each kind of home, with a known address."""
    return functools.partial(net_rig, request.param, mac=MAC.hex(":"))


@pytest.mark.parametrize(
    ("data", "command"),
    [
        (bytes([0, 0, 1]), RxMode(RxFlag.PROMISC, True)),
        (bytes([0, 5, 0]), RxMode(RxFlag.NOBCAST, False)),
        (mac_table([MAC], [GROUP, BROADCAST]), MacTable((MAC,), (GROUP, BROADCAST))),
        (mac_table([], []), MacTable((), ())),
        (bytes([1, 1]) + MAC, MacAddress(MAC)),
        (vlan(7), Vlan(7, True)),
        (vlan(4095, add=False), Vlan(4095, False)),
        (bytes([3, 0]), AnnounceAck()),
        (use_pairs(2), PairsInUse(2)),
        (offloads(1 << 55), GuestOffloads(1 << 55)),
    ],
)
def test_a_command_is_parsed(data: bytes, command: Command) -> None:
    assert parse(data) == command


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        bytes([0, 6, 1]),  # no such flag
        bytes([0, 0]),
        bytes([0, 0, 1, 0]),
        mac_table([MAC], [])[:-1],
        mac_table([MAC], []) + b"\x00",
        bytes([1, 0]) + b"\xff" * 4,
        bytes([1, 0]) + b"\xff" * 64,
        bytes([1, 1]) + MAC[:5],
        bytes([1, 1]) + MAC + b"\x00",
        bytes([1, 1]) + GROUP,
        bytes([1, 1]) + bytes(6),
        bytes([1, 2]) + MAC,
        bytes([2, 0, 1]),
        vlan(4096),
        bytes([2, 2, 1, 0]),
        bytes([3, 0, 0]),
        bytes([3, 1]),
        bytes([4, 0, 1]),
        bytes([4, 1, 1, 0]),
        bytes([5, 0]) + bytes(7),
        bytes([5, 0]) + bytes(9),
        bytes([6, 0]),
        bytes([255, 255]) + bytes(100),
    ],
)
def test_what_is_no_command_is_none(data: bytes) -> None:
    assert parse(data) is None


async def arrive(net: Net, *frames: bytes) -> None:
    """Frames come to the host's end, then one that every filter lets through."""
    for each in (*frames, frame(MAC)):
        net.tap.wire.send(HEADER + each)


async def test_a_driver_that_asks_for_nothing_receives_everything(plugged: Plugged) -> None:
    async with plugged() as net:
        net.offer_rx(8)
        await arrive(net, frame(OTHER))
        assert await net.received() == frame(OTHER)
        assert await net.received() == frame(MAC)
        assert net.counter("rx_filtered") == 0


async def test_without_promisc_frames_for_others_are_dropped(plugged: Plugged) -> None:
    async with plugged() as net:
        assert await net.control(PROMISC_OFF) == OK
        net.offer_rx(8)
        await arrive(net, frame(OTHER), frame(GROUP))
        assert await net.received() == frame(MAC)
        net.tap.wire.send(HEADER + frame(BROADCAST))
        assert await net.received() == frame(BROADCAST)
        assert net.counter("rx_filtered") == 2


@pytest.mark.parametrize(
    ("commands", "to", "passes"),
    [
        ([mac_table([OTHER], [])], OTHER, True),
        ([mac_table([], [GROUP])], GROUP, True),
        ([mac_table([], [GROUP]), mac_table([], [])], GROUP, False),
        ([mac_table([bytes([2, 0, 0, 0, 0, n]) for n in range(100)], [])], OTHER, True),
        ([mac_table([], [bytes([3, 0, 0, 0, 0, n]) for n in range(100)])], GROUP, True),
        ([rx_mode(RxFlag.ALLMULTI, 1)], GROUP, True),
        ([rx_mode(RxFlag.ALLMULTI, 1), rx_mode(RxFlag.ALLMULTI, 0)], GROUP, False),
        ([rx_mode(RxFlag.ALLMULTI, 1), rx_mode(RxFlag.NOMULTI, 1)], GROUP, False),
        ([rx_mode(RxFlag.ALLUNI, 1)], OTHER, True),
        ([mac_table([OTHER], []), rx_mode(RxFlag.NOUNI, 1)], OTHER, False),
        ([rx_mode(RxFlag.NOBCAST, 1)], BROADCAST, False),
        ([mac_address(OTHER)], OTHER, True),
        ([rx_mode(RxFlag.PROMISC, 1)], OTHER, True),
    ],
)
async def test_the_filter_is_what_the_driver_made_it(
    commands: list[bytes], to: bytes, passes: bool
) -> None:
    async with net_rig(0, mac=MAC.hex(":")) as net:
        for command in (PROMISC_OFF, *commands):
            assert await net.control(command) == OK
        net.tap.wire.send(HEADER + frame(to))
        net.offer_rx(8)
        await settle()
        assert len(net.rx.take_used()) == passes
        assert net.counter("rx_filtered") == (not passes)


async def test_a_filter_looks_into_buffers_in_pieces(plugged: Plugged) -> None:
    async with plugged() as net:
        assert await net.control(PROMISC_OFF) == OK
        net.offer_rx(20, size_bytes=13)
        await arrive(net, frame(OTHER))
        used = await net.rig.driver.used(0, 6)
        packet = b"".join(net.rig.memory.read(net.buffers[0, h], n) for h, n in used)
        assert packet[12:] == frame(MAC)
        assert net.counter("rx_filtered") == 1


async def test_tagged_frames_pass_for_the_networks_that_were_added(plugged: Plugged) -> None:
    async with plugged() as net:
        net.offer_rx(8)
        for command in (vlan(7), vlan(8), vlan(8, add=False)):
            assert await net.control(command) == OK
        await arrive(net, frame(MAC, vlan=8), frame(MAC, vlan=7), frame(MAC, vlan=0))
        assert await net.received() == frame(MAC, vlan=7)
        assert net.counter("rx_filtered") == 1


async def test_a_reset_forgets_filter_and_address(plugged: Plugged) -> None:
    async with plugged() as net:
        assert await net.control(PROMISC_OFF) == OK
        assert await net.control(mac_address(OTHER)) == OK
        assert net.rig.device.config.data[:6] == OTHER
        await net.rig.driver.start()
        assert net.rig.device.config.data[:6] == MAC
        net.offer_rx(1)
        net.tap.wire.send(HEADER + frame(OTHER))
        assert await net.received() == frame(OTHER)


async def test_offloads_are_switched_within_what_was_negotiated(plugged: Plugged) -> None:
    accept = features.VERSION_1 | features.NET_CTRL_VQ | features.NET_CTRL_GUEST_OFFLOADS
    accept |= features.NET_GUEST_CSUM | features.NET_GUEST_TSO4
    async with plugged(accept) as net:
        assert await net.control(offloads(features.NET_GUEST_CSUM)) == OK
        assert await net.control(offloads(0)) == OK
        assert await net.control(offloads(features.NET_GUEST_TSO6)) == ERROR
        both = OFFLOAD_CSUM | OFFLOAD_TSO4
        assert net.tap.offloads == [both, OFFLOAD_CSUM, 0]


async def test_the_driver_is_asked_to_announce_itself_and_acknowledges(plugged: Plugged) -> None:
    async with plugged() as net:
        driver, device = net.rig.driver, net.rig.device
        assert driver.read(STATUS, 2) == LINK_UP
        await device.quiesce()
        await device.resume()
        assert await driver.interrupted() == CONFIG_CHANGE
        assert driver.read(STATUS, 2) == LINK_UP | ANNOUNCE
        assert await net.control(ANNOUNCE_ACK) == OK
        assert driver.read(STATUS, 2) == LINK_UP


async def test_one_pair_works_until_the_driver_asks_for_more(plugged: Plugged) -> None:
    async with plugged(pairs=3, size=16) as net:
        assert net.rig.driver.read(PAIRS_MAX, 2) == 3
        for pair in range(3):
            net.offer_rx(4, pair=pair)
            net.tap.wires[pair].send(HEADER + b"in %d" % pair)
        assert await net.received(0) == b"in 0"
        net.send(b"too early", pair=2)
        await settle()
        assert net.rig.driver.queues[2].take_used() == []
        assert net.tap.queues[-1] == [True, False, False]
        assert await net.control(use_pairs(3)) == OK
        assert net.tap.queues[-1] == [True, True, True]
        for pair in (1, 2):
            assert await net.received(pair) == b"in %d" % pair
        assert await net.tap.sent(2) == b"too early"
        net.send(b"from pair 1", pair=1)
        assert await net.tap.sent(1) == b"from pair 1"


async def test_pairs_that_are_given_up_receive_nothing(plugged: Plugged) -> None:
    async with plugged(pairs=2, size=16) as net:
        assert await net.control(use_pairs(2)) == OK
        net.offer_rx(4, pair=1)
        assert await net.control(use_pairs(1)) == OK
        assert net.tap.queues[-1] == [True, False]
        net.tap.wires[1].send(HEADER + b"nobody")
        net.offer_rx(4)
        net.tap.wire.send(HEADER + b"somebody")
        assert await net.received() == b"somebody"
        assert net.rig.driver.queues[2].take_used() == []


async def test_more_pairs_than_there_are_are_refused(plugged: Plugged) -> None:
    async with plugged(pairs=2, size=16) as net:
        for count in (0, 3, 65535):
            assert await net.control(use_pairs(count)) == ERROR
        assert await net.control(use_pairs(2)) == OK


async def test_without_multi_queue_the_control_queue_is_the_third(plugged: Plugged) -> None:
    accept = features.VERSION_1 | features.NET_CTRL_VQ | features.NET_CTRL_RX
    async with plugged(accept, pairs=2, size=16) as net:
        assert await net.control(PROMISC_OFF, queue=2) == OK
        assert await net.control(use_pairs(1), queue=2) == ERROR


async def test_a_driver_without_a_control_queue_uses_the_pairs_it_sets_up(
    plugged: Plugged,
) -> None:
    async with plugged(features.VERSION_1 | features.NET_MQ, pairs=2, size=16) as net:
        net.offer_rx(4, pair=1)
        net.tap.wires[1].send(HEADER + b"second pair")
        assert await net.received(1) == b"second pair"


@pytest.mark.parametrize(
    "command",
    [b"", b"\x00", bytes([9, 9]), bytes([0, 0]) + bytes(100), bytes(70_000)],
    ids=["empty", "short", "unknown", "long", "huge"],
)
async def test_what_is_no_command_is_answered_and_counted(plugged: Plugged, command: bytes) -> None:
    async with plugged() as net:
        assert await net.control(command) == ERROR
        assert (net.counter("control_commands"), net.counter("control_errors")) == (1, 1)
        assert await net.control(PROMISC_OFF) == OK
        assert net.rig.device.statistics().faults == 0


@pytest.mark.parametrize(
    "command",
    [PROMISC_OFF, bytes([0, 2, 1]), mac_table([], []), mac_address(MAC), vlan(1), ANNOUNCE_ACK],
)
async def test_commands_without_their_feature_are_refused(command: bytes) -> None:
    async with net_rig(0, features.VERSION_1 | features.NET_CTRL_VQ) as net:
        assert await net.control(command) == ERROR


async def test_a_command_without_room_for_its_ack_is_a_fault(plugged: Plugged) -> None:
    async with plugged() as net:
        driver = net.rig.driver
        driver.queues[-1].offer(Segment(CONTROL_GPA, 3))
        driver.kick(len(driver.queues) - 1)
        assert await driver.interrupted() == CONFIG_CHANGE
        assert net.rig.device.statistics().last_fault == "request"
        assert driver.read(mmio.STATUS) & DEVICE_NEEDS_RESET


async def test_more_commands_than_a_turn_takes_are_all_answered(plugged: Plugged) -> None:
    async with plugged() as net:
        driver, queue = net.rig.driver, net.rig.driver.queues[-1]
        net.rig.memory.write(CONTROL_GPA, PROMISC_OFF)
        for _ in range(4):
            for at in range(queue.size // 2):
                queue.offer(
                    Segment(CONTROL_GPA, 3), Segment(CONTROL_GPA + 16 + at, 1, writable=True)
                )
            driver.kick(len(driver.queues) - 1)
            await driver.used(len(driver.queues) - 1, queue.size // 2)
        assert net.counter("control_commands") == 2 * queue.size
