"""What an in-process switch does, by a clock of the test's own."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avmm.errors import ConfigError
from avmm.hostnet.cable import QUEUE_DEFAULT_BYTES, QUEUE_MIN_BYTES, CableEnd, make_cable
from avmm.hostnet.fabric import Fabric, Link
from avmm.native import ffi, lib
from fakes.frames import BROADCAST, GSO_TCPV4, A, B, C, frame, tcp_frame, vnet

MS = 1_000_000
WALL_NS = 1_700_000_000_123_456_789


@dataclass
class Net:
    """A switch at a time, `now`, and who is at its ports."""

    fabric: Fabric
    now: int = 10**12
    next_ns: int = 0
    hosts: dict[int, CableEnd] = field(default_factory=dict)

    def add(self, link: Link | None = None, queue_bytes: int = QUEUE_DEFAULT_BYTES) -> int:
        host, end = make_cable(queue_bytes)
        host.set_up(True)
        end.set_up(True)
        port = self.fabric.attach(end, link or Link(), queue_bytes)
        self.hosts[port] = host
        return port

    def send(self, port: int, *frames: bytes, header: bytes | None = None) -> int:
        lengths = ffi.new("uint32_t[]", [len(f) for f in frames])
        return int(
            lib.av_cable_send(
                self.hosts[port].native, header or ffi.NULL, b"".join(frames), lengths, len(frames)
            )
        )

    def turn(self, after_ns: int = 0) -> None:
        """Let time pass, and the switch do all that is due."""
        self.now += after_ns
        more = True
        while more:
            more, self.next_ns = self.fabric.turn(self.now, WALL_NS + self.now - 10**12)

    def received(self, port: int) -> list[bytes]:
        room, lengths = ffi.new("uint8_t[]", 1 << 17), ffi.new("uint32_t[]", 1)
        found = []
        while lib.av_cable_take(self.hosts[port].native, room, 1 << 17, lengths, 1):
            found.append(ffi.buffer(room, lengths[0])[:])
        return found

    def learn(self, *ports: tuple[int, bytes]) -> None:
        """Have it known who is where."""
        for port, mac in ports:
            self.send(port, frame(to=mac, sender=mac))
            self.turn()
        for port in self.hosts:
            self.received(port)


def make(
    *,
    seed: int = 1,
    addresses_max: int = 64,
    port_addresses_max: int = 16,
    age_s: float = 300,
) -> Net:
    return Net(
        Fabric(
            seed=seed,
            addresses_max=addresses_max,
            port_addresses_max=port_addresses_max,
            age_s=age_s,
        )
    )


@pytest.fixture
def net() -> Iterator[Net]:
    made = make()
    yield made
    made.fabric.close()


def test_frames_for_nobody_known_go_to_all_others(net: Net) -> None:
    a, b, c = net.add(), net.add(), net.add()
    net.send(a, frame(to=B, sender=A))
    net.turn()
    assert net.received(b) == net.received(c) == [frame(to=B, sender=A)]
    assert net.received(a) == []
    assert net.fabric.statistics()[0].flooded == 1


def test_an_address_is_learnt_from_who_sends(net: Net) -> None:
    a, b, c = net.add(), net.add(), net.add()
    net.learn((b, B))
    net.send(a, frame(to=B))
    net.turn()
    assert net.received(b) == [frame(to=B)]
    assert net.received(c) == []
    assert net.fabric.find(B, net.now) == b
    assert net.fabric.find(C, net.now) is None


@pytest.mark.parametrize("to", [BROADCAST, bytes.fromhex("01005e000001")])
def test_frames_for_a_group_go_to_all_others(net: Net, to: bytes) -> None:
    a, b, c = net.add(), net.add(), net.add()
    net.learn((a, A), (b, B), (c, C))
    net.send(a, frame(to=to))
    net.turn()
    assert net.received(b) == net.received(c) == [frame(to=to)]


def test_a_frame_does_not_go_back_where_it_came_from(net: Net) -> None:
    a, b = net.add(), net.add()
    net.learn((a, A), (a, C))
    before = net.fabric.statistics()[0].same_port
    net.send(a, frame(to=C, sender=A))
    net.turn()
    assert net.received(a) == net.received(b) == []
    assert net.fabric.statistics()[0].same_port == before + 1


def test_an_address_that_moves_is_found_at_once(net: Net) -> None:
    a, b, c = net.add(), net.add(), net.add()
    net.learn((b, B), (c, B))
    net.send(a, frame(to=B))
    net.turn()
    assert (net.received(b), net.received(c)) == ([], [frame(to=B)])
    assert net.fabric.statistics()[0].moved == 1
    assert net.fabric.statistics()[0].addresses == 2  # B, and A


def test_an_address_not_heard_of_is_forgotten(net: Net) -> None:
    a, b, c = net.add(), net.add(), net.add()
    net.learn((b, B))
    for after_s, known in ((299, True), (2, False)):
        net.turn(after_s * 1000 * MS)
        net.send(a, frame(to=B))
        net.turn()
        assert len(net.received(b)) == 1
        assert bool(net.received(c)) != known


def test_a_group_cannot_be_a_sender(net: Net) -> None:
    a, b = net.add(), net.add()
    net.send(a, frame(sender=BROADCAST))
    net.turn()
    assert net.received(b) == []
    assert net.fabric.port_statistics(a).refused == 1


def mac(port: int, number: int) -> bytes:
    return bytes([2, port]) + number.to_bytes(4, "big")


def test_a_port_that_makes_up_addresses_does_not_drive_out_others(net: Net) -> None:
    a, b, c = net.add(), net.add(), net.add()
    net.learn((b, B), (c, C))
    for number in range(500):
        net.send(a, frame(to=B, sender=mac(1, number)))
        net.turn()
    assert net.fabric.port_statistics(a).addresses <= 16
    assert net.fabric.find(B, net.now) == b
    assert net.fabric.find(C, net.now) == c
    assert len(net.received(b)) == 500
    assert net.received(c) == []


def test_the_table_is_bounded_and_counts_what_it_holds() -> None:
    net = make(addresses_max=32, port_addresses_max=16)
    ports = [net.add() for _ in range(8)]
    for port in ports:
        for number in range(16):
            net.send(port, frame(to=BROADCAST, sender=mac(port, number)))
        net.turn()
    statistics = net.fabric.statistics()[0]
    assert statistics.addresses <= 32
    assert statistics.unlearned > 0
    found = [net.fabric.find(mac(port, number), net.now) for port in ports for number in range(16)]
    assert sum(f is not None for f in found) == statistics.addresses
    assert statistics.addresses == sum(net.fabric.port_statistics(p).addresses for p in ports)
    net.fabric.close()


def test_old_addresses_of_a_port_make_room_for_new_ones(net: Net) -> None:
    a, _ = net.add(), net.add()
    for number in range(16):
        net.send(a, frame(to=BROADCAST, sender=mac(1, number)))
    net.turn()
    net.turn(301_000 * MS)
    for number in range(100, 116):
        net.send(a, frame(to=BROADCAST, sender=mac(1, number)))
    net.turn()
    assert net.fabric.find(mac(1, 3), net.now) is None
    assert net.fabric.port_statistics(a).addresses >= 8


def test_a_delay_holds_in_each_direction_of_a_link(net: Net) -> None:
    a, b = net.add(Link(delay_s=0.010)), net.add(Link(delay_s=0.005))
    net.send(a, frame())
    net.turn()
    assert net.next_ns == net.now + 10 * MS
    net.turn(10 * MS)
    assert net.next_ns == net.now + 5 * MS
    net.turn(5 * MS - 1)
    assert net.received(b) == []
    net.turn(1)
    assert net.received(b) == [frame()]
    assert net.next_ns == 0


def test_a_late_turn_adds_nothing_to_the_delay(net: Net) -> None:
    a, b = net.add(Link(delay_s=0.010)), net.add(Link(delay_s=0.005))
    net.send(a, frame())
    net.turn()
    net.turn(15 * MS)
    assert net.received(b) == [frame()]


def test_jitter_keeps_frames_in_order_and_in_bounds(net: Net) -> None:
    a, b = net.add(Link(delay_s=0.010, jitter_s=0.004)), net.add()
    sent = [frame(payload=b"%d" % n) for n in range(50)]
    arrivals, received = [], []
    for each in sent:
        net.send(a, each)
        net.turn(MS // 10)
    start = net.now
    while net.next_ns:
        net.turn(net.next_ns - net.now)
        new = net.received(b)
        received += new
        arrivals += [net.now - start] * len(new)
    assert received == sent
    assert arrivals[0] >= 5 * MS
    assert arrivals[-1] <= 14 * MS
    assert len(set(arrivals)) > 5


def test_a_rate_spaces_frames(net: Net) -> None:
    a, b = net.add(Link(bits_per_s=8_000_000)), net.add()  # a byte a microsecond
    big = frame(payload=bytes(986))
    net.send(a, big, big, big)
    net.turn()
    for _ in range(3):
        assert net.received(b) == []
        net.turn(MS)
        assert net.received(b) == [big]
    net.send(a, big)  # the link was idle meanwhile
    net.turn(5 * MS)
    assert net.received(b) == []
    net.turn(MS)
    assert net.received(b) == [big]


def test_a_link_loses_its_part_the_same_for_the_same_seed() -> None:
    def run(seed: int, others: int) -> list[int]:
        net = make(seed=seed)
        a, b = net.add(Link(loss=0.25)), net.add()
        c = net.add(Link(loss=0.5))
        for n in range(1000):
            net.send(a, frame(payload=b"%d" % n))
            for _ in range(others):
                net.send(c, frame(sender=C, payload=b"other"))
            net.turn()
        arrived = [int(f[14:]) for f in net.received(b) if f[14:] != b"other"]
        lost = net.fabric.port_statistics(a).lost
        net.fabric.close()
        if not others:
            assert len(arrived) + lost == 1000
        return arrived

    first = run(7, 0)
    assert 680 < len(first) < 820
    assert run(7, 0) == first
    assert run(8, 0) != first


def test_what_others_carry_does_not_change_what_a_link_loses() -> None:
    def lost_of_a(others: int) -> int:
        net = make()
        a, c = net.add(Link(loss=0.3)), net.add(Link(loss=0.5))
        b = net.add()
        net.learn((b, B))
        for _ in range(500):
            net.send(a, frame(to=B))
            for _ in range(others):
                net.send(c, frame(to=B, sender=C))
            net.turn()
        lost = net.fabric.port_statistics(a).lost
        net.fabric.close()
        return lost

    assert lost_of_a(0) == lost_of_a(2)


def test_all_and_nothing_may_be_lost(net: Net) -> None:
    a, b = net.add(Link(loss=1.0)), net.add()
    net.send(a, *[frame()] * 200)
    net.send(b, *[frame(to=A, sender=B)] * 200)
    net.turn()
    assert net.received(a) == net.received(b) == []
    net.fabric.set_link(a, Link())
    net.send(a, *[frame()] * 200)
    net.turn()
    assert len(net.received(b)) == 200


def large(payload_bytes: int) -> tuple[bytes, bytes]:
    return vnet(gso=GSO_TCPV4, segment_bytes=1000), tcp_frame(bytes(payload_bytes))


def test_on_a_link_with_loss_each_segment_has_its_own_fate(net: Net) -> None:
    a, b = net.add(Link(loss=0.2)), net.add()
    header, data = large(50_000)
    net.send(a, data, header=header)
    net.turn()
    arrived = net.received(b)
    assert 25 < len(arrived) < 50
    assert len(arrived) + net.fabric.port_statistics(a).lost == 50


def test_large_frames_pass_whole_to_who_takes_them(net: Net) -> None:
    a, b, c = net.add(), net.add(), net.add()
    net.hosts[b].set_offloads(15)
    header, data = large(50_000)
    net.send(a, data, header=header)
    net.turn()
    assert net.received(b) == [data]
    assert len(net.received(c)) == 50


def test_a_slow_port_loses_frames_and_holds_up_nobody(net: Net) -> None:
    a, b, c = net.add(), net.add(queue_bytes=QUEUE_MIN_BYTES), net.add()
    big = frame(to=BROADCAST, payload=bytes(9000))
    for _ in range(100):
        net.send(a, big)
        net.turn()
        assert net.received(c) == [big]
    arrived = len(net.received(b))
    assert 20 < arrived < 30
    assert net.fabric.port_statistics(b).dropped == 100 - arrived


def test_who_sends_into_a_slow_link_waits(net: Net) -> None:
    a, b = net.add(Link(delay_s=1.0), queue_bytes=QUEUE_MIN_BYTES), net.add()
    big = frame(payload=bytes(9000))
    sent = 0
    for _ in range(100):
        sent += net.send(a, big)
        net.turn()
    assert sent < 100
    net.turn(1000 * MS)
    net.turn(1000 * MS)
    net.turn(1000 * MS)
    assert net.received(b) == [big] * sent
    assert net.fabric.port_statistics(a).dropped == 0


def test_a_cut_link_forgets_what_is_under_way_and_who_is_there(net: Net) -> None:
    a, b = net.add(Link(delay_s=0.010)), net.add()
    net.learn((b, B))
    net.send(a, frame())
    net.turn(20 * MS)
    net.turn(20 * MS)
    net.received(b)
    net.send(a, frame())
    net.turn()
    assert net.fabric.port_statistics(a).in_flight_frames == 1
    net.fabric.cut(a)
    net.turn(20 * MS)
    assert net.received(b) == []
    assert net.fabric.find(A, net.now) is None
    assert net.fabric.find(B, net.now) == b


def test_a_port_without_anybody_counts_what_it_would_have_got(net: Net) -> None:
    a, b = net.add(), net.add()
    net.hosts[b].set_up(False)
    net.send(a, frame())
    net.turn()
    assert net.fabric.port_statistics(b).down == 1
    assert net.fabric.port_statistics(b).out_frames == 0


def test_a_detached_port_s_number_is_used_again(net: Net) -> None:
    a, b, c = net.add(), net.add(), net.add()
    net.learn((b, B))
    net.fabric.detach(b)
    assert net.fabric.find(B, net.now) is None
    net.send(a, frame(to=B))
    net.turn()
    assert net.received(c) == [frame(to=B)]
    assert net.add() == b


def test_many_ports(net: Net) -> None:
    ports = [net.add() for _ in range(200)]
    net.send(ports[0], frame(to=BROADCAST))
    net.turn()
    assert all(len(net.received(port)) == 1 for port in ports[1:])


def test_statistics_count_frames_and_bytes(net: Net) -> None:
    a, b = net.add(), net.add()
    net.send(a, frame(), frame())
    net.turn()
    one, other = net.fabric.port_statistics(a), net.fabric.port_statistics(b)
    assert (one.in_frames, one.in_bytes) == (2, 2 * len(frame()))
    assert (other.out_frames, other.out_bytes) == (2, 2 * len(frame()))
    assert net.fabric.statistics()[0].frames == 2


def parse_pcap(data: bytes) -> list[tuple[int, int, bytes]]:
    """(time in ns, length on the wire, bytes) of each record; classic pcap with nanoseconds."""
    magic, major, minor, _, _, _, link = struct.unpack_from("<IHHIIII", data)
    assert (magic, major, minor, link) == (0xA1B23C4D, 2, 4, 1)
    records, at = [], 24
    while at < len(data):
        s, ns, size, wire = struct.unpack_from("<IIII", data, at)
        at += 16
        records.append((s * 10**9 + ns, wire, data[at : at + size]))
        assert len(records[-1][2]) == size
        at += size
    return records


def captured(path: Path, net: Net, snap: int = 65549, limit: int = 0) -> int:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    assert net.fabric.capture(file, snap, limit) == 0
    return file


def test_a_capture_has_each_frame_once_when_it_came_in(net: Net, tmp_path: Path) -> None:
    a, b, c = net.add(Link(delay_s=0.003)), net.add(), net.add(Link(delay_s=0.050))
    file = captured(tmp_path / "x.pcap", net)
    net.send(a, frame(to=BROADCAST))
    net.turn()
    net.turn(3 * MS)
    net.turn(7 * MS)
    net.send(b, frame(to=A, sender=B, payload=b"answer"))
    net.turn()
    net.turn(100 * MS)
    # All of it is in the file before the capture ends.
    records = parse_pcap((tmp_path / "x.pcap").read_bytes())
    assert [r[2] for r in records] == [
        frame(to=BROADCAST),
        frame(to=A, sender=B, payload=b"answer"),
    ]
    assert [r[0] for r in records] == [WALL_NS + 3 * MS, WALL_NS + 10 * MS]
    assert net.fabric.capture(-1, 0, 0) == 0
    os.close(file)
    assert net.received(c)


def test_a_capture_shows_frames_as_on_a_wire(net: Net, tmp_path: Path) -> None:
    a, b = net.add(), net.add()
    net.hosts[b].set_offloads(15)
    file = captured(tmp_path / "x.pcap", net)
    header, data = large(3000)
    net.send(a, data, header=header)
    net.send(a, tcp_frame(b"partial"), header=vnet())
    net.turn()
    net.fabric.capture(-1, 0, 0)
    os.close(file)
    records = parse_pcap((tmp_path / "x.pcap").read_bytes())
    assert [len(r[2]) - 66 for r in records] == [1000, 1000, 1000, 7]
    assert records[3][2] == tcp_frame(b"partial", complete=True)
    assert net.received(b) == [data, tcp_frame(b"partial")]
    assert net.fabric.statistics()[1].frames == 4


def test_a_capture_is_cut_and_bounded(net: Net, tmp_path: Path) -> None:
    a, b = net.add(), net.add()
    file = captured(tmp_path / "x.pcap", net, snap=20, limit=24 + 3 * 36)
    for _ in range(10):
        net.send(a, frame(payload=bytes(100)))
    net.turn()
    statistics = net.fabric.statistics()[1]
    assert (statistics.frames, statistics.missed, statistics.error) == (3, 7, None)
    assert statistics.bytes == 24 + 3 * 36
    net.fabric.capture(-1, 0, 0)
    os.close(file)
    records = parse_pcap((tmp_path / "x.pcap").read_bytes())
    assert [(r[1], r[2]) for r in records] == [(114, frame()[:14] + bytes(6))] * 3
    assert len(net.received(b)) == 10


def test_a_switch_outlives_a_capture_that_cannot_be_written(net: Net, tmp_path: Path) -> None:
    a, b = net.add(), net.add()
    file = os.open("/dev/full", os.O_WRONLY)
    assert net.fabric.capture(file, 65549, 0) == -28  # ENOSPC, by the file's header
    os.close(file)
    reader, writer = os.pipe()
    assert net.fabric.capture(writer, 65549, 0) == 0
    os.close(reader)
    net.send(a, frame())
    net.turn()
    net.send(a, frame())
    net.turn()
    assert len(net.received(b)) == 2
    assert net.fabric.statistics()[1].error == "Broken pipe"
    assert net.fabric.statistics()[1].missed == 1
    assert net.fabric.capture(-1, 0, 0) == -32
    os.close(writer)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"delay_s": -1}, "delay_s"),
        ({"delay_s": float("nan")}, "delay_s"),
        ({"jitter_s": 4000}, "jitter_s"),
        ({"loss": 1.1}, "loss"),
        ({"loss": float("nan")}, "loss"),
        ({"bits_per_s": 0}, "bits_per_s"),
        ({"bits_per_s": float("inf")}, "bits_per_s"),
    ],
)
def test_a_link_without_sense_is_refused(values: dict[str, float], name: str) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        Link(**values)
    assert caught.value.kind == "link"


@pytest.mark.parametrize(
    "values", [{"addresses_max": 0}, {"port_addresses_max": 0}, {"age_s": 0}, {"age_s": -1}]
)
def test_a_table_without_sense_is_refused(values: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        make(**values)  # type: ignore[arg-type]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 4),
            st.sampled_from([A, B, C, BROADCAST]) | st.binary(min_size=6, max_size=6),
            st.sampled_from([A, B, C, BROADCAST]) | st.binary(min_size=6, max_size=6),
            st.integers(0, 20),
        ),
        max_size=60,
    )
)
def test_a_switch_forwards_as_a_model_of_it_does(
    steps: list[tuple[int, bytes, bytes, int]],
) -> None:
    net = make(addresses_max=4096, port_addresses_max=64, age_s=0.1)
    ports = [net.add() for _ in range(5)]
    known: dict[bytes, tuple[int, int]] = {}
    for number, (port, to, sender, wait_ms) in enumerate(steps):
        net.turn(wait_ms * MS)
        data = frame(to=to, sender=sender, payload=b"%d" % number)
        net.send(port, data)
        net.turn()
        expected: set[int] = set()
        if not sender[0] & 1:
            known[sender] = (port, net.now)
            place = known.get(to)
            if not to[0] & 1 and place and net.now - place[1] <= 100 * MS:
                expected = {place[0]} - {port}
            else:
                expected = set(ports) - {port}
        assert {p for p in ports if net.received(p) == [data]} == expected
    net.fabric.close()
