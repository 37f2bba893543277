"""A NIC in Python's hands: its device, its cable, and a switch between two of them."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from avmm.errors import ConfigError
from avmm.hostnet.cable import QUEUE_MIN_BYTES
from avmm.hostnet.switch import Switch
from avmm.machine.config import Config
from avmm.virtio import features
from avmm.virtio.devices.net import RX, TX
from avmm.virtio.devices.nic import Nic
from avmm.virtio.state import DEVICE_NEEDS_RESET
from avmm.virtio.transport import mmio
from fakes.frames import BROADCAST, GSO_TCPV4, A, B, frame, tcp_frame, vnet
from fakes.mmio_driver import eventually, settle
from fakes.net_rig import nic_rig

STATUS = mmio.CONFIG + 6
LINK_UP = 1
MAC = "02:00:00:00:00:01"


@pytest.fixture(params=[0, 1], ids=["loop", "thread"])
def io_threads(request: pytest.FixtureRequest) -> int:
    threads: int = request.param
    return threads


async def test_frames_go_both_ways(io_threads: int) -> None:
    nic = Nic(MAC)
    async with nic_rig(nic, io_threads) as net:
        net.send(frame(payload=b"from the guest"))
        assert await nic.receive() == frame(payload=b"from the guest")
        net.offer_rx(4)
        await nic.send(frame(payload=b"to the guest"))
        (packet,) = await net.received()
        assert packet[12:] == frame(payload=b"to the guest")
        assert packet[:10] == bytes(10)
        assert nic.is_up
        counters = net.rig.device.statistics().counters
        assert (counters["tx_packets"], counters["rx_packets"]) == (1, 1)
        assert nic.statistics().received_frames == 1


async def test_many_frames_arrive_in_order(io_threads: int) -> None:
    nic = Nic(MAC)
    async with nic_rig(nic, io_threads) as net:
        frames = [frame(payload=b"%d" % n) for n in range(60)]
        net.send(*frames)
        received: list[bytes] = []
        while len(received) < 60:
            received += await nic.receive_many()
        assert received == frames
        net.offer_rx(60, size_bytes=256)
        await nic.send_many(frames)
        assert [p[12:] for p in await net.received(60)] == frames


async def test_an_iteration_ends_with_the_microvm_and_the_next_may_have_the_nic() -> None:
    nic = Nic(MAC)
    for number in range(2):
        seen: list[bytes] = []

        async def read(seen: list[bytes] = seen) -> None:
            async for each in nic:
                seen.append(each)

        async with nic_rig(nic) as net:
            reading = asyncio.create_task(read())
            net.send(frame(payload=b"%d" % number))
            await eventually(lambda seen=seen: len(seen) == 1)  # type: ignore[misc]
        await reading
        assert seen == [frame(payload=b"%d" % number)]
        assert await nic.receive() == b""
        assert not nic.is_up


async def test_a_nic_waits_for_its_first_microvm() -> None:
    nic = Nic(MAC)
    receiving = asyncio.create_task(nic.receive())
    await settle()
    async with nic_rig(nic) as net:
        net.send(frame())
        assert await receiving == frame()


async def test_a_nic_leaves_no_descriptor_behind() -> None:
    before = len(os.listdir("/proc/self/fd"))
    nic = Nic(MAC)
    async with nic_rig(nic):
        receiving = asyncio.create_task(nic.receive())
        await settle()
        receiving.cancel()
    await settle()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_nic_is_of_one_microvm_at_a_time() -> None:
    nic = Nic(MAC, id="wan")
    async with nic_rig(nic) as net:
        with pytest.raises(ConfigError, match="wan: it is in use") as caught:
            async with nic_rig(nic):
                pass
        assert caught.value.kind == "nic-busy"
        net.send(frame())
        assert await nic.receive() == frame()


async def test_without_a_driver_frames_are_lost() -> None:
    nic = Nic(MAC)
    await nic.send(frame())
    async with nic_rig(nic, start=False) as net:
        await nic.send(frame())
        await net.rig.driver.start()
        net.offer_rx(4)
        await nic.send(frame(payload=b"third"))
        (packet,) = await net.received()
        assert packet[12:] == frame(payload=b"third")
        assert nic.statistics().lost_down == 2
        await net.rig.driver.set_status(0)
        await nic.send(frame())
        assert nic.statistics().lost_down == 3


async def test_a_reader_that_never_reads_loses_frames_and_the_guest_goes_on(
    io_threads: int,
) -> None:
    nic = Nic(MAC, queue_bytes=QUEUE_MIN_BYTES)
    async with nic_rig(nic, io_threads) as net:
        for _ in range(20):
            net.send(*[frame(payload=bytes(20_000))] * 3)
            await net.rig.driver.used(TX, 3)
        received = 0
        while nic.receive_nowait():
            received += 1
        assert QUEUE_MIN_BYTES * 0.7 < received * 20_014 < QUEUE_MIN_BYTES
        counters = net.rig.device.statistics().counters
        assert counters["tx_packets"] == 60


async def test_a_guest_that_never_accepts_makes_the_sender_wait(io_threads: int) -> None:
    nic = Nic(MAC, queue_bytes=QUEUE_MIN_BYTES)
    async with nic_rig(nic, io_threads) as net:
        sending = asyncio.create_task(nic.send_many([frame(payload=bytes(1000))] * 1000))
        await settle()
        assert not sending.done()
        arrived = 0
        while arrived < 1000:
            net.offer_rx(16)
            arrived += len(await net.received(16))
            net.buffers.clear()
            if arrived + 16 > 1000:
                break
        await sending
        assert nic.statistics().lost_full == 0


async def test_a_sender_goes_on_when_the_microvm_ends() -> None:
    nic = Nic(MAC, queue_bytes=QUEUE_MIN_BYTES)
    async with nic_rig(nic):
        sending = asyncio.create_task(nic.send_many([frame(payload=bytes(1000))] * 1000))
        await settle()
        assert not sending.done()
    await sending
    assert nic.statistics().lost_down > 700


async def test_large_frames_of_a_guest_come_segmented(io_threads: int) -> None:
    nic = Nic(MAC)
    async with nic_rig(nic, io_threads) as net:
        net.send(tcp_frame(bytes(3000)), header=vnet(gso=GSO_TCPV4, segment_bytes=1400))
        received: list[bytes] = []
        while len(received) < 3:
            received += await nic.receive_many()
        assert [len(f) - 66 for f in received] == [1400, 1400, 200]
        assert nic.statistics().segmented == 0


async def test_a_header_without_sense_costs_the_guest_its_frame() -> None:
    nic = Nic(MAC)
    async with nic_rig(nic) as net:
        net.send(frame(), header=vnet(start=5000))
        await net.rig.driver.used(TX)
        net.send(frame(payload=b"good"))
        assert await nic.receive() == frame(payload=b"good")
        assert net.rig.device.statistics().counters["tx_dropped"] == 1
        assert not net.rig.driver.status() & DEVICE_NEEDS_RESET


async def test_a_frame_that_is_none_costs_the_guest_its_frame() -> None:
    nic = Nic(MAC)
    async with nic_rig(nic) as net:
        net.send(b"short")
        await net.rig.driver.used(TX)
        net.send(frame())
        assert await nic.receive() == frame()
        assert net.rig.device.statistics().counters["tx_dropped"] == 1


async def test_the_cable_is_pulled_from_either_side(io_threads: int) -> None:
    nic = Nic(MAC)
    async with nic_rig(nic, io_threads) as net:
        net.offer_rx(4)
        nic.set_link(False)
        assert not net.rig.driver.read(STATUS, 2) & LINK_UP
        await nic.send(frame())
        net.send(frame())
        await net.rig.driver.used(TX)
        assert nic.receive_nowait() is None
        assert not nic.is_up
        net.rig.device.set_link(True)
        assert nic.link_up
        await nic.send(frame(payload=b"again"))
        (packet,) = await net.received()
        assert packet[12:] == frame(payload=b"again")


async def test_a_cable_that_is_out_stays_out_for_the_next_microvm() -> None:
    nic = Nic(MAC)
    nic.set_link(False)
    async with nic_rig(nic) as net:
        assert not net.rig.driver.read(STATUS, 2) & LINK_UP
        nic.set_link(True)
        assert net.rig.driver.read(STATUS, 2) & LINK_UP
        assert nic.is_up


async def test_the_cable_may_be_pulled_on_another_thread() -> None:
    nic = Nic(MAC)
    async with nic_rig(nic) as net:
        await asyncio.to_thread(nic.set_link, False)
        await eventually(lambda: not net.rig.driver.read(STATUS, 2) & LINK_UP)


async def test_the_driver_sees_what_the_nic_was_made_with() -> None:
    nic = Nic(MAC, mtu=9000)
    async with nic_rig(nic, start=False) as net:
        offered = await net.rig.driver.read_features()
        mac = bytes(net.rig.driver.read(mmio.CONFIG + n, 1) for n in range(6))
        assert mac == bytes.fromhex(MAC.replace(":", ""))
        assert net.rig.driver.read(mmio.CONFIG + 10, 2) == 9000
    wanted = features.NET_CSUM | features.NET_HOST_TSO4 | features.NET_GUEST_TSO | features.NET_MTU
    assert offered & wanted == wanted
    assert not offered & (features.NET_MQ | features.NET_HOST_USO | features.NET_GUEST_USO)


async def test_two_guests_on_a_switch(io_threads: int) -> None:
    one, other = Nic(), Nic()
    with Switch() as switch:
        switch.attach(one)
        switch.attach(other)
        async with nic_rig(one, io_threads) as a, nic_rig(other, io_threads) as b:
            b.offer_rx(8)
            a.offer_rx(8)
            a.send(frame(to=B, sender=A))
            (packet,) = await b.received()
            assert packet[12:] == frame(to=B, sender=A)
            b.send(frame(to=A, sender=B))
            (packet,) = await a.received()
            assert packet[12:] == frame(to=A, sender=B)


async def test_a_large_frame_goes_whole_to_a_guest_that_takes_it(io_threads: int) -> None:
    one, other, third = Nic(), Nic(), Nic()
    data = tcp_frame(bytes(3000))
    with Switch() as switch:
        for nic in (one, other, third):
            switch.attach(nic)
        async with (
            nic_rig(one, io_threads) as a,
            nic_rig(other, io_threads) as b,
            nic_rig(third, io_threads, features.VERSION_1 | features.NET_MRG_RXBUF) as c,
        ):
            b.offer_rx(4, size_bytes=4096)
            c.offer_rx(4)
            a.send(data, header=vnet(gso=GSO_TCPV4, segment_bytes=1000))
            (packet,) = await b.received()
            assert packet[12:] == data
            header = vnet(gso=GSO_TCPV4, segment_bytes=1000, header_bytes=66)
            assert packet[:10] == header[:10]
            assert [len(p) - 78 for p in await c.received(3)] == [1000, 1000, 1000]


async def test_a_guest_waits_for_a_slow_link_and_loses_nothing(io_threads: int) -> None:
    nic = Nic(queue_bytes=QUEUE_MIN_BYTES)
    with Switch() as switch:
        port = switch.attach(nic, delay_s=3600, queue_bytes=QUEUE_MIN_BYTES)
        async with nic_rig(nic, io_threads) as net:
            data = frame(payload=bytes(30_000))
            used = 0
            for _ in range(30):
                net.send(data)
                await settle()
                used += len(net.rig.driver.queues[TX].take_used())
            assert used < 30
            port.set_link(False)
            port.set_link(True)  # what was under way is gone
            port.change(delay_s=0.0)
            await eventually(
                lambda: (
                    net.rig.device.statistics().counters["tx_packets"]
                    + net.rig.device.statistics().counters["tx_dropped"]
                    == 30
                )
            )


async def test_a_python_host_and_a_guest_on_a_switch() -> None:
    nic = Nic()
    with Switch() as switch:
        switch.attach(nic)
        host = switch.port("02:00:00:00:00:09")
        async with nic_rig(nic) as net:
            net.offer_rx(4)
            net.send(frame(to=BROADCAST))
            assert await host.receive() == frame(to=BROADCAST)
            await host.send(frame(to=A, sender=B))
            assert (await net.received())[0][12:] == frame(to=A, sender=B)
        assert switch.statistics().frames == 2
    assert await host.receive() == b""
    await host.send(frame())
    assert host.statistics().lost_down == 1


async def test_a_nic_on_a_switch_is_not_for_python_until_it_is_detached() -> None:
    nic = Nic(MAC, id="lan")
    with Switch(name="office") as switch:
        port = switch.attach(nic)
        for call in (nic.receive_nowait, lambda: nic.send_nowait(frame())):
            with pytest.raises(ConfigError, match=r"lan: it is attached to <Switch office>"):
                call()
        with pytest.raises(ConfigError, match="attached"):
            switch.attach(nic)
        async with nic_rig(nic) as net:
            port.detach()
            port.detach()
            assert port.statistics().in_frames == 0
            net.send(frame())
            assert await nic.receive() == frame()
            switch.attach(nic)
            net.send(frame())
            await eventually(lambda: switch.statistics().frames == 1)
    assert nic.receive_nowait() is None


async def test_links_of_a_switch_go_up_and_down() -> None:
    nic = Nic()
    with Switch() as switch:
        port = switch.attach(nic)
        host = switch.port()
        async with nic_rig(nic) as net:
            port.set_link(False)
            assert not port.link_up
            assert not net.rig.driver.read(STATUS, 2) & LINK_UP
            port.set_link(True)
            assert net.rig.driver.read(STATUS, 2) & LINK_UP
            host.port.set_link(False)
            assert not host.is_up
            await host.send(frame())
            host.port.set_link(True)
            assert host.is_up
            net.send(frame(to=BROADCAST))
            assert await host.receive() == frame(to=BROADCAST)


async def test_conditions_of_a_link_are_changed_one_by_one() -> None:
    with Switch() as switch:
        host = switch.port(delay_s=0.5, loss=0.1)
        host.port.change(loss=0.2)
        assert (host.port.link.delay_s, host.port.link.loss) == (0.5, 0.2)
        with pytest.raises(ConfigError, match="loss"):
            host.port.change(loss=2.0)
        with pytest.raises(ConfigError, match="speed"):
            host.port.change(speed=2.0)
        assert host.port.link.loss == 0.2


async def test_a_delayed_frame_arrives_by_a_timer() -> None:
    with Switch() as switch:
        one, other = switch.port(delay_s=0.001), switch.port(delay_s=0.001)
        await one.send(frame())
        await settle()
        assert other.receive_nowait() is None
        assert await other.receive() == frame()


async def test_a_capture_is_one_at_a_time_and_ends_with_its_block(tmp_path: Path) -> None:
    path = tmp_path / "x.pcap"
    with Switch() as switch:
        one, other = switch.port(), switch.port()
        with switch.capture(path) as capture:
            with pytest.raises(ConfigError, match="captured"):
                switch.capture(tmp_path / "y.pcap")
            await one.send(frame())
            await other.receive()
            assert capture.statistics().frames == 1
        size = path.stat().st_size
        assert size == 24 + 16 + len(frame())
        await one.send(frame())
        await other.receive()
        assert path.stat().st_size == size
        assert capture.statistics().frames == 1
        still = switch.capture(path)
    assert still.statistics().frames == 0
    still.close()


async def test_a_closed_switch_says_so_and_gives_everything_back() -> None:
    before = len(os.listdir("/proc/self/fd"))
    nic = Nic()
    switch = Switch()
    port = switch.attach(nic)
    host = switch.port()
    receiving = asyncio.create_task(host.receive())
    await settle()
    switch.close()
    switch.close()
    assert await receiving == b""
    assert len(os.listdir("/proc/self/fd")) == before
    for call in (switch.port, lambda: port.set_link(True), lambda: port.change(loss=0.0)):
        with pytest.raises(ConfigError):
            call()
    assert nic.receive_nowait() is None


async def test_find_tells_who_is_where() -> None:
    with Switch() as switch:
        one, other = switch.port(), switch.port()
        await one.send(frame(sender=A))
        await other.receive()
        assert switch.find(A.hex(":")) is one.port
        assert switch.find(B.hex(":")) is None


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"mac": "01:00:00:00:00:00"}, "mac"),
        ({"mac": "nonsense"}, "mac"),
        ({"mtu": 10}, "mtu"),
        ({"queue_size": 3}, "queue"),
        ({"queue_bytes": 1}, "queue"),
        ({"guest": "10.0.0.2"}, "address"),
        ({"guest": "10.0.0.2/99"}, "address"),
        ({"guest": "10.0.0.2/24", "gateway": "10.0.1.1"}, "address"),
        ({"gateway": "10.0.0.1"}, "address"),
        ({"home": "attic"}, "value"),
        ({"mac": 5}, "value"),
        ({"mtu": "1500"}, "value"),
    ],
)
def test_a_nic_without_sense_is_refused(values: dict[str, object], kind: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Nic(**values)  # type: ignore[arg-type]
    assert kind in caught.value.kind


def test_a_config_takes_nics_beside_others() -> None:
    nic = Nic(guest="10.0.0.2/24", gateway="10.0.0.1")
    config = Config(kernel="k", nets=[nic, Nic(id="lan")])
    assert [id for id, _ in config.all_devices()] == ["net0", "lan"]
    assert "ip=10.0.0.2::10.0.0.1:255.255.255.0::eth0:off" in config.full_cmdline()
    with pytest.raises(ConfigError, match="given 2 times"):
        Config(kernel="k", nets=[nic, nic])


def test_addresses_at_random_differ() -> None:
    assert len({Nic().mac for _ in range(20)}) == 20


async def test_a_nic_on_pause_keeps_frames(io_threads: int) -> None:
    nic = Nic()
    async with nic_rig(nic, io_threads) as net:
        net.offer_rx(4)
        await net.rig.device.quiesce()
        await nic.send(frame(payload=b"kept"))
        await settle()
        assert net.rig.driver.queues[RX].take_used() == []
        await net.rig.device.resume()
        assert (await net.received())[0][12:] == frame(payload=b"kept")
