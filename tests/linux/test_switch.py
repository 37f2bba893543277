"""NICs in Python's hands and the switch between them: stock guests, no TAP."""

from __future__ import annotations

import asyncio
import re
import struct
from pathlib import Path

import avmm
from avmm.units import MIB
from linux.guest import Guests, Running

BULK_BYTES = 20 * MIB
PORT = 5001


def packets(path: Path) -> list[tuple[int, bytes]]:
    """(time in ns, frame) of each record of a pcap file with nanoseconds."""
    data, at = path.read_bytes(), 24
    assert data[:4] == b"\x4d\x3c\xb2\xa1"
    found = []
    while at < len(data):
        s, ns, size, wire = struct.unpack_from("<IIII", data, at)
        assert size == wire
        found.append((s * 10**9 + ns, data[at + 16 : at + 16 + size]))
        at += 16 + size
    return found


def word_sum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    value = sum(struct.unpack(f">{len(data) // 2}H", data))
    while value >> 16:
        value = (value & 0xFFFF) + (value >> 16)
    return value


def tcp_is_right(frame: bytes) -> bool:
    """Whether an IPv4 frame's header and its TCP segment have the right checksums."""
    ip = frame[14:]
    header, length = (ip[0] & 15) * 4, int.from_bytes(ip[2:4], "big")
    segment = ip[header:length]
    pseudo = ip[12:20] + struct.pack(">BBH", 0, 6, len(segment))
    return word_sum(ip[:header]) == 0xFFFF and word_sum(pseudo + segment) == 0xFFFF


# nc goes on to receive as long as there may be something to send: a pipe nobody closes.
SERVER = f"""
mkfifo /hold
nc -l -p {PORT} <>/hold >/got &
until grep -q ':{PORT:04X} .* 0A ' /proc/net/tcp /proc/net/tcp6; do usleep 10000; done
echo LISTENING
wait $!
echo "FACT got $(sha256sum </got | cut -d ' ' -f 1)"
echo DONE
read -r go
until [ "$(cat /sys/class/net/eth0/carrier)" = 0 ]; do usleep 10000; done
echo UNPLUGGED
until [ "$(cat /sys/class/net/eth0/carrier)" = 1 ]; do usleep 10000; done
echo PLUGGED
read -r go
"""

CLIENT = f"""
head -c {BULK_BYTES} /dev/urandom >/up
echo "FACT sent $(sha256sum </up | cut -d ' ' -f 1)"
echo READY
read -r go
nc 10.8.0.2 {PORT} </up >/dev/null
echo SENT
read -r go
ping -c 5 -W 10 10.8.0.2
echo PINGED
read -r go
ping -c 40 -i 0.02 -W 1 10.8.0.2
echo LOSSY
read -r go
ping -c 2 -W 1 10.8.0.2 || echo "FACT unreachable"
echo TRIED
read -r go
ping -c 2 -W 10 10.8.0.2 >/dev/null && echo "FACT again ok"
"""


async def tell(guest: Running) -> None:
    await guest.vm.console.write(b"go\n")


def times_ms(text: str) -> list[float]:
    return [float(t) for t in re.findall(r"time=([0-9.]+) ms", text)]


async def test_two_guests_on_a_switch(guests: Guests, tmp_path: Path) -> None:
    nics = [avmm.Nic(guest="10.8.0.2/24"), avmm.Nic(guest="10.8.0.3/24")]
    capture = tmp_path / "net.pcap"
    with avmm.Switch(seed=5) as switch:
        ports = [switch.attach(nic) for nic in nics]
        async with (
            guests.running(SERVER, nets=[nics[0]]) as server,
            guests.running(CLIENT, nets=[nics[1]]) as client,
        ):
            await asyncio.gather(server.says("LISTENING"), client.says("READY"))
            with switch.capture(capture) as captured:
                await tell(client)
                await asyncio.gather(server.says("DONE"), client.says("SENT"))
            assert captured.statistics().missed == 0
            in_switch = switch.statistics().frames

            ports[0].change(delay_s=0.050)
            await tell(client)
            await client.says("PINGED")
            delayed = times_ms(client.text)

            ports[0].change(delay_s=0.0, loss=0.3)
            await tell(client)
            await client.says("LOSSY")
            lossy = len(times_ms(client.text)) - len(delayed)
            lost = ports[0].statistics().lost

            ports[0].change(loss=0.0)
            ports[0].set_link(False)
            await tell(server)
            await server.says("UNPLUGGED")
            await tell(client)
            await client.says("TRIED")
            ports[0].set_link(True)
            await server.says("PLUGGED")
            await tell(client)
            await client.ended()
            await tell(server)
            await server.ended()
        statistics = [port.statistics() for port in ports]
    assert (server.status, client.status) == (0, 0)
    assert server.fact("got") == client.fact("sent")
    frames = [frame for _, frame in packets(capture)]
    # Large segments go as they came, and only the capture cuts them. How many of them are large
    # is up to the sender's pacing.
    assert in_switch < len(frames)
    tcp = [f for f in frames if f[12:14] == b"\x08\0" and f[23] == 6]
    assert max(map(len, frames)) <= 1514
    assert sum(len(f) for f in tcp) > BULK_BYTES
    assert all(tcp_is_right(f) for f in tcp)
    assert [t for t, _ in packets(capture)] == sorted(t for t, _ in packets(capture))
    assert len(delayed) == 5
    assert min(delayed) >= 100
    assert 0 < lossy < 40
    assert lost > 0
    client.fact("unreachable")
    assert client.fact("again") == "ok"
    assert statistics[0].down > 0
    assert all(s.dropped == 0 for s in statistics)
