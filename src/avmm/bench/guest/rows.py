"""The work of a benchmark guest, row by row, as lines of its script (scripts/guest/bench/lib)."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from avmm.bench.guest import parse
from avmm.bench.guest.parse import Reading

HOST, GUEST, PREFIX = "172.31.78.1", "172.31.78.2", 24
NETMASK = "255.255.255.0"
PPS_PORT = 5202
PACKET_BYTES = 64
_PINGS_PER_SECOND = 200


@dataclass(frozen=True, slots=True)
class Row:
    """key: its name within the guest. line: of the script, for so many seconds. device: the kind
    whose queues it loads. packets: a request is a packet of the NIC, for programs that count
    bytes."""

    key: str
    title: str
    unit: str
    better: Literal["higher", "lower"]
    device: Literal["blk", "net", "vsock"]
    line: Callable[[float], str]
    read: Callable[[str], Reading]
    packets: bool = False


def _blk(key: str, title: str, options: str, *, bandwidth: bool = False) -> Row:
    return Row(
        key,
        title,
        "B/s" if bandwidth else "IOPS",
        "higher",
        "blk",
        lambda seconds: f"blk {key} {seconds:g} {options}",
        partial(parse.fio, bandwidth=bandwidth),
    )


BLK = (
    _blk("rr1", "4k random read QD1", "--rw=randread --bs=4k --iodepth=1"),
    _blk("rr32", "4k random read QD32", "--rw=randread --bs=4k --iodepth=32"),
    _blk("rw1", "4k random write QD1", "--rw=randwrite --bs=4k --iodepth=1"),
    _blk("rw32", "4k random write QD32", "--rw=randwrite --bs=4k --iodepth=32"),
    _blk("sr", "256k read QD8", "--rw=read --bs=256k --iodepth=8", bandwidth=True),
    _blk("sw", "256k write QD8", "--rw=write --bs=256k --iodepth=8", bandwidth=True),
)


def _tcp(key: str, title: str, options: str) -> Row:
    def line(seconds: float) -> str:
        return f"tcp {key} {max(1, round(seconds))} {HOST} {options}".rstrip()

    return Row(key, title, "bit/s", "higher", "net", line, parse.iperf3, packets=True)


def _pps(key: str, title: str, verb: str) -> Row:
    def line(seconds: float) -> str:
        return f"row {key} pps {verb} {HOST} {PPS_PORT} {seconds * 1000:.0f} {PACKET_BYTES}"

    return Row(key, title, "packets/s", "higher", "net", line, parse.pps)


def _ping_line(seconds: float) -> str:
    return f"row ping ping -A -c {max(50, round(seconds * _PINGS_PER_SECOND))} {HOST}"


NET = (
    _tcp("up", "TCP guest to host", ""),
    _tcp("down", "TCP host to guest", "--reverse"),
    _pps("pup", "UDP 64 B guest to host", "send"),
    _pps("pdown", "UDP 64 B host to guest", "receive"),
    Row("ping", "ping, median", "s", "lower", "net", _ping_line, parse.ping),
)


DROP_PORT, ZERO_PORT, ECHO_PORT = 5210, 5211, 5212


def _vsock(key: str, title: str, unit: str, port: int, how: str) -> Row:
    def line(seconds: float) -> str:
        return f"row {key} vsock measure {port} {how} {seconds * 1000:.0f}"

    trips = unit == "s"
    return Row(
        key,
        title,
        unit,
        "lower" if trips else "higher",
        "vsock",
        line,
        partial(parse.vsock, round_trips=trips),
    )


VSOCK = (
    _vsock("vup", "vsock guest to host", "B/s", DROP_PORT, "send"),
    _vsock("vdown", "vsock host to guest", "B/s", ZERO_PORT, "receive"),
    _vsock("vecho", "vsock byte there and back", "s", ECHO_PORT, "echo"),
    _vsock("vconnect", "vsock connections of the guest", "1/s", DROP_PORT, "connect"),
)


def cmdline(rows: Sequence[Row], seconds: float) -> str:
    """A kernel command line whose guest does these rows, reports and powers off."""
    script = "\n".join([". /bench/lib", *(row.line(seconds) for row in rows), "report"])
    words = ["console=ttyS0 quiet panic=-1"]
    if any(row.device == "net" for row in rows):
        words.append(f"ip={GUEST}:::{NETMASK}::eth0:off")
    return " ".join([*words, f"avmm.cmd={base64.b64encode(script.encode()).decode()}"])
