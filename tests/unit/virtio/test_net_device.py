"""virtio-net: frames, the cable, what is negotiated."""

from __future__ import annotations

import errno
import functools
import os
import socket
import struct

import pytest

from avmm.errors import HostError
from avmm.hostnet.tap import (
    OFFLOAD_CSUM,
    OFFLOAD_TSO4,
    OFFLOAD_TSO6,
    OFFLOAD_TSO_ECN,
    OFFLOAD_USO4,
    OFFLOAD_USO6,
)
from avmm.log import LINES_AT_ONCE
from avmm.virtio import features
from avmm.virtio.devices.net import RX, TX
from avmm.virtio.interrupt import CONFIG_CHANGE
from avmm.virtio.state import DEVICE_NEEDS_RESET
from avmm.virtio.transport import mmio
from fakes.driver_queue import USED, PackedDriverQueue, Segment
from fakes.mmio_driver import eventually, settle
from fakes.net_rig import HEADER, TX_GPA, Plugged, net_rig

STATUS = mmio.CONFIG + 6
LINK_UP, ANNOUNCE = 1, 2


@pytest.fixture(params=[0, 1], ids=["loop", "thread"])
def plugged(request: pytest.FixtureRequest) -> Plugged:
    """net_rig() on each kind of home."""
    return functools.partial(net_rig, request.param)


async def test_frames_go_both_ways(plugged: Plugged) -> None:
    async with plugged() as net:
        net.send(b"from the guest")
        assert await net.tap.sent() == b"from the guest"
        net.offer_rx(4)
        net.tap.wire.send(HEADER + b"to the guest")
        assert await net.received() == b"to the guest"
        counters = net.rig.device.statistics().counters
        assert (counters["tx_packets"], counters["tx_bytes"]) == (1, 14)
        assert (counters["rx_packets"], counters["rx_bytes"]) == (1, 12)


async def test_a_frame_waits_in_the_tap_until_there_are_buffers(plugged: Plugged) -> None:
    async with plugged() as net:
        net.tap.wire.send(HEADER + b"early")
        net.tap.wire.send(HEADER + b"second")
        await settle()
        net.offer_rx(1)
        assert await net.received() == b"early"
        await settle()
        net.offer_rx(1)
        assert await net.received() == b"second"
        assert net.rig.device.statistics().counters["rx_dropped"] == 0


async def test_frames_wait_in_the_ring_while_the_tap_is_full(plugged: Plugged) -> None:
    frames = [b"frame %d" % i for i in range(40)]
    async with plugged() as net:
        for at, frame in enumerate(frames):
            net.send(frame, at)
        await settle()
        assert len(net.rig.driver.queues[TX].take_used()) < len(frames)
        assert [await net.tap.sent() for _ in frames] == frames
        assert net.rig.device.statistics().counters["tx_dropped"] == 0


async def test_the_driver_is_told_of_every_frame_that_went(plugged: Plugged) -> None:
    async with plugged() as net:
        for at in range(100):
            for _ in range(at % 3 + 1):  # some at a time, so that it pays to hold an interrupt back
                net.send(b"frame")
                await net.tap.sent()
            assert len(await net.rig.driver.used(TX, at % 3 + 1)) == at % 3 + 1


async def test_at_rest_no_interrupt_is_held_back(plugged: Plugged) -> None:
    async with plugged() as net:
        for _ in range(50):
            net.send(b"frame")
            await net.tap.sent()
            await net.rig.device.quiesce()
            await net.rig.driver.used(TX)
            await net.rig.device.resume()


async def test_a_large_frame_fills_several_buffers(plugged: Plugged) -> None:
    frame = os.urandom(5000)
    async with plugged() as net:
        net.offer_rx(40)
        net.tap.wire.send(HEADER + frame)
        used = await net.rig.driver.used(RX, 3)
        packet = b"".join(net.rig.memory.read(net.buffers[0, h], n) for h, n in used)
        assert packet[10:12] == b"\x03\x00"
        assert packet[12:] == frame


async def test_a_frame_beyond_the_mtu_is_never_delivered_cut(plugged: Plugged) -> None:
    frame = os.urandom(5000)
    async with plugged(features.VERSION_1 | features.NET_MRG_RXBUF) as net:
        net.offer_rx(40)
        for _ in range(2):  # the host's MTU was raised, which the first one tells
            net.tap.wire.send(HEADER + frame)
        used = await net.rig.driver.used(RX, 3)
        packet = b"".join(net.rig.memory.read(net.buffers[0, h], n) for h, n in used)
        assert packet[12:] == frame
        assert net.counter("rx_dropped") == 1


@pytest.mark.parametrize(
    ("bits", "flags"),
    [
        (0, 0),
        (features.NET_GUEST_CSUM, OFFLOAD_CSUM),
        (
            features.NET_GUEST_CSUM | features.NET_GUEST_TSO4 | features.NET_GUEST_TSO6,
            OFFLOAD_CSUM | OFFLOAD_TSO4 | OFFLOAD_TSO6,
        ),
        (None, OFFLOAD_CSUM | OFFLOAD_TSO4 | OFFLOAD_TSO6 | OFFLOAD_TSO_ECN),
        # Not without what each needs.
        (features.NET_GUEST_TSO4 | features.NET_GUEST_TSO6, 0),
        (features.NET_GUEST_CSUM | features.NET_GUEST_ECN, OFFLOAD_CSUM),
    ],
)
async def test_the_tap_may_offload_what_the_driver_accepted(
    plugged: Plugged, bits: int | None, flags: int
) -> None:
    accept = None if bits is None else bits | features.VERSION_1
    async with plugged(accept) as net:
        assert net.tap.offloads == [flags]


@pytest.mark.parametrize(
    ("bits", "flags"),
    [
        (
            features.NET_GUEST_CSUM | features.NET_GUEST_USO4 | features.NET_GUEST_USO6,
            OFFLOAD_CSUM | OFFLOAD_USO4 | OFFLOAD_USO6,
        ),
        (features.NET_GUEST_CSUM | features.NET_GUEST_USO4, OFFLOAD_CSUM),
    ],
)
async def test_udp_segmentation_is_offloaded_for_both_versions_of_ip_or_none(
    plugged: Plugged, bits: int, flags: int
) -> None:
    async with plugged(bits | features.VERSION_1, uso=True) as net:
        assert net.tap.offloads == [flags]


async def test_udp_segmentation_is_offered_where_the_host_has_it(plugged: Plugged) -> None:
    bits = features.NET_GUEST_USO4 | features.NET_GUEST_USO6 | features.NET_HOST_USO
    async with plugged(uso=True) as net:
        assert await net.rig.driver.read_features() & bits == bits
    async with plugged() as net:
        assert await net.rig.driver.read_features() & bits == 0


async def test_the_configuration_shows_mac_status_and_mtu(plugged: Plugged) -> None:
    async with plugged(mac="52:54:00:00:00:01", mtu=9000) as net:
        driver = net.rig.driver
        mac = bytes(driver.read(mmio.CONFIG + i, 1) for i in range(6))
        assert mac.hex(":") == "52:54:00:00:00:01"
        assert driver.read(STATUS, 2) == 1
        assert driver.read(mmio.CONFIG + 10, 2) == 9000
        assert await driver.read_features() & features.NET_MTU


async def test_without_an_mtu_the_feature_is_not_offered(plugged: Plugged) -> None:
    async with plugged() as net:
        assert not await net.rig.driver.read_features() & features.NET_MTU


async def test_a_mac_of_its_own_is_local_and_unicast(plugged: Plugged) -> None:
    async with plugged() as one, plugged() as other:
        assert one.rig.device.mac[0] & 0b11 == 0b10
        assert one.rig.device.mac != other.rig.device.mac


async def test_without_a_cable_nothing_is_received(plugged: Plugged) -> None:
    async with plugged() as net:
        driver, device = net.rig.driver, net.rig.device
        device.set_link(False)
        assert await driver.interrupted() == CONFIG_CHANGE
        assert driver.read(STATUS, 2) == 0
        net.offer_rx(4)
        net.tap.wire.send(HEADER + b"later")
        await settle()
        assert net.rx.take_used() == []
        device.set_link(True)
        assert await net.received() == b"later"
        assert driver.read(STATUS, 2) == LINK_UP | ANNOUNCE
        assert net.tap.carrier == [False, True]


async def test_a_cable_pulled_before_the_driver_came_stays_out(plugged: Plugged) -> None:
    async with plugged() as net:
        await net.rig.driver.write(mmio.STATUS, 0)
        net.rig.device.set_link(False)
        assert net.rig.device.statistics().interrupts == 0
        await net.rig.driver.start()
        net.offer_rx(1)
        net.tap.wire.send(HEADER + b"later")
        await settle()
        assert net.rx.take_used() == []


async def test_a_tap_that_is_taken_away_costs_the_carrier_and_not_the_vm(
    plugged: Plugged,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with plugged() as net:
        net.offer_rx(1)
        await settle()
        # What a TAP that somebody deleted does: an event, and reads fail.
        net.tap.wire.shutdown(socket.SHUT_WR)
        assert await net.rig.driver.interrupted() == CONFIG_CHANGE
        assert not net.rig.device.link_up
        assert net.rig.driver.read(STATUS, 2) == 0
        assert net.rig.driver.read(mmio.STATUS) & DEVICE_NEEDS_RESET == 0
        net.send(b"into the void")
        await eventually(lambda: net.counter("tx_dropped") == 1)
    assert "avtest0" in caplog.text


async def test_a_guest_that_resets_a_nic_without_its_tap_does_not_fill_the_log(
    plugged: Plugged, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise HostError("tap", op="TUNSETOFFLOAD", errno=errno.EBADFD)

    async with plugged() as net:
        monkeypatch.setattr(net.tap, "set_offload", refuse)
        for _ in range(2 * LINES_AT_ONCE):
            await net.rig.driver.start()
        assert len(caplog.records) == LINES_AT_ONCE


async def test_a_receive_buffer_too_small_for_a_header_is_a_fault(plugged: Plugged) -> None:
    async with plugged() as net:
        net.offer_rx(1, size_bytes=8)
        net.tap.wire.send(HEADER + b"x")
        assert await net.rig.driver.interrupted() == CONFIG_CHANGE
        assert net.rig.device.statistics().last_fault == "request"
        await net.rig.driver.start()
        net.offer_rx(4)
        assert await net.received() == b"x"


async def test_buffers_taken_before_a_reset_belong_to_the_driver_again(plugged: Plugged) -> None:
    async with plugged() as net:
        net.offer_rx(8)
        net.tap.wire.send(HEADER + b"first")
        assert await net.received() == b"first"
        await net.rig.driver.start()
        net.tap.wire.send(HEADER + b"second")
        await settle()
        assert net.rx.take_used() == []
        net.offer_rx(8)
        assert await net.received() == b"second"


async def test_in_order_one_used_descriptor_speaks_for_all_that_was_sent(plugged: Plugged) -> None:
    async with plugged() as net:
        driver = net.rig.driver
        await driver.start(await driver.read_features())
        queue = driver.queues[TX]
        net.rig.memory.write(TX_GPA, HEADER + b"frame")
        ids = [queue.offer(Segment(TX_GPA, len(HEADER) + 5)) for _ in range(3)]
        driver.kick(TX)
        assert await driver.used(TX, 3) == [(id, 0) for id in ids]
        if isinstance(queue, PackedDriverQueue):
            ring = struct.iter_unpack("<QIHH", net.rig.memory.read(queue.desc_gpa, 3 * 16))
            assert [id for *_, id, flags in ring if flags & USED] == [ids[-1]]


async def test_receive_buffers_that_were_held_are_taken_again_where_a_queue_goes_on(
    plugged: Plugged,
) -> None:
    async with plugged() as net:
        net.offer_rx(8)
        net.tap.wire.send(HEADER + b"first")
        assert await net.received() == b"first"
        await settle()
        driver, queue = net.rig.driver, net.rig.device.queues[RX]
        await driver.write(mmio.QUEUE_SEL, RX)
        await driver.write(mmio.QUEUE_READY, 0)
        assert queue.base == net.rx.base


async def test_one_queue_is_taken_away_and_the_other_goes_on(plugged: Plugged) -> None:
    async with plugged() as net:
        net.offer_rx(8)
        net.tap.wire.send(HEADER + b"first")
        assert await net.received() == b"first"
        driver = net.rig.driver
        await driver.write(mmio.QUEUE_SEL, TX)
        await driver.write(mmio.QUEUE_READY, 0)
        net.tap.wire.send(HEADER + b"second")
        assert await net.received() == b"second"
        assert net.rig.device.statistics().faults == 0
        queue = driver.queues[TX] = net.rig.driver.new_queue(0x40000, 64)
        await driver.set_up_queue(TX, queue)
        net.send(b"from the guest")
        assert await net.tap.sent() == b"from the guest"


async def test_an_offload_the_host_refuses_is_the_machines_to_know(
    plugged: Plugged,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(flags: int) -> None:
        raise HostError("tap", op="TUNSETOFFLOAD", path="avtest0", errno=22)

    async with plugged() as net:
        monkeypatch.setattr(net.tap, "set_offload", refused)
        await net.rig.driver.start()
        assert net.rig.driver.read(mmio.STATUS) & DEVICE_NEEDS_RESET
        assert [type(e) for e in net.rig.errors] == [HostError]
        net.rig.errors.clear()


async def test_nothing_is_watched_when_the_device_is_gone(plugged: Plugged) -> None:
    before = set(os.listdir("/proc/self/fd"))
    async with plugged() as net:
        net.offer_rx(2)
        for at in range(40):
            net.send(b"frame", at)
        await settle()
    assert set(os.listdir("/proc/self/fd")) == before
