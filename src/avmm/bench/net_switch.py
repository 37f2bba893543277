"""Suite net-switch: frames between two ports of an in-process switch, with no VM.

One thread. The first rows are the switch itself: frames are put into one cable and taken out of
another in C, some hundred a call, so there are three copies of each; the others are what a host
written in Python makes of it, a frame a turn of its loop's coroutine. Their peer is a switch that
Python itself would be: a socket pair a cable, read and written frame by frame.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

from avmm.bench.record import OWN, Aim, Case
from avmm.bench.suite import Options
from avmm.hostnet.cable import CableEnd, make_cable
from avmm.hostnet.fabric import Fabric, Link
from avmm.hostnet.switch import Switch
from avmm.loop import run as run_loop
from avmm.native import ffi, lib

SUITE = "net-switch"
PEER = "socket pairs"

_BATCH = 128
_HEADER = bytes.fromhex("020000000002 020000000001 88b5")
_BACK = bytes.fromhex("020000000001 020000000002 88b5")


@dataclass(frozen=True, slots=True)
class Row:
    """in_python: between hosts in Python."""

    name: str
    frame_bytes: int
    in_python: bool


ROWS = (
    Row("64 B from port to port", 64, False),
    Row("1514 B from port to port", 1514, False),
    Row("64 KB from port to port", 65_000, False),
    Row("64 B from Python to Python", 64, True),
    Row("1514 B from Python to Python", 1514, True),
)


def cases(options: Options) -> Iterator[Case]:
    """See the suite protocol."""
    for row in ROWS:
        series: dict[str, list[float]] = {OWN: []}
        for _ in range(options.runs):
            if row.in_python:
                series[OWN].append(run_loop(_between_hosts(row, options.seconds)))
                series.setdefault(PEER, []).append(_socket_pairs(row, options.seconds))
            else:
                series[OWN].append(_between_ports(row, options.seconds))
        aims = [Aim(PEER, 2.0)] if row.in_python else []
        yield Case(SUITE, row.name, "frames/s", "higher", series, aims)


def _between_ports(row: Row, seconds: float) -> float:
    fabric = Fabric(seed=0, addresses_max=64, port_addresses_max=64, age_s=1e6)
    sender, receiver = _host(fabric), _host(fabric)
    one = ffi.new("uint32_t[1]", [row.frame_bytes])
    pad = bytes(row.frame_bytes - len(_HEADER))
    lib.av_cable_send(receiver.native, ffi.NULL, _BACK + pad, one, 1)
    batch = min(_BATCH, 500_000 // row.frame_bytes)
    data, lengths = (_HEADER + pad) * batch, ffi.new("uint32_t[]", [row.frame_bytes] * batch)
    room = ffi.new("uint8_t[]", len(data))
    count, began = 0, time.perf_counter_ns()
    end = began + int(seconds * 1e9)
    while (now := time.perf_counter_ns()) < end:
        lib.av_cable_send(sender.native, ffi.NULL, data, lengths, batch)
        fabric.turn(now, now)
        count += lib.av_cable_take(receiver.native, room, len(data), lengths, batch)
    fabric.close()
    return count / ((now - began) / 1e9)


def _host(fabric: Fabric) -> CableEnd:
    host, end = make_cable()
    host.set_up(True)
    end.set_up(True)
    fabric.attach(end, Link(), 1 << 20)
    return host


async def _between_hosts(row: Row, seconds: float) -> float:
    pad = bytes(row.frame_bytes - len(_HEADER))
    with Switch() as switch:
        sender, receiver = switch.port(), switch.port()
        await receiver.send(_BACK + pad)
        await sender.receive()
        end = time.perf_counter() + seconds

        async def send() -> None:
            frame = _HEADER + pad
            while time.perf_counter() < end:
                for _ in range(_BATCH):
                    await sender.send(frame)
                await asyncio.sleep(0)
            receiver.close()

        sending = asyncio.create_task(send())
        count, began = 0, time.perf_counter()
        async for _ in receiver:
            count += 1
        await sending
        return count / (time.perf_counter() - began)


def _socket_pairs(row: Row, seconds: float) -> float:
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    (sender, first), (second, receiver) = pairs
    table: dict[bytes, socket.socket] = {_HEADER[:6]: second}
    frame = _HEADER + bytes(row.frame_bytes - len(_HEADER))
    for end in (sender, first, second, receiver):
        end.setblocking(False)
    count, began = 0, time.perf_counter()
    while (now := time.perf_counter()) < began + seconds:
        try:
            while True:
                sender.send(frame)
        except BlockingIOError:
            pass
        try:
            while True:
                passing = first.recv(70_000)
                table[passing[6:12]] = first
                table[passing[:6]].send(passing)
        except BlockingIOError:
            pass
        try:
            while True:
                receiver.recv(70_000)
                count += 1
        except BlockingIOError:
            pass
    for end in (sender, first, second, receiver):
        end.close()
    return count / (now - began)
