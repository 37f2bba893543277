"""What the programs in the guest print, as numbers. Each raises ValueError on what is no result."""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass

import msgspec


@dataclass(frozen=True, slots=True)
class Reading:
    """One row's result. value: in the row's unit. requests: how many there were; 0 unknown."""

    value: float
    requests: int = 0
    p50_s: float | None = None
    p99_s: float | None = None


class _Latency(msgspec.Struct):
    percentile: dict[str, int] = {}


class _Direction(msgspec.Struct):
    iops: float
    bw_bytes: int
    total_ios: int
    clat_ns: _Latency


class _Job(msgspec.Struct):
    error: int
    read: _Direction
    write: _Direction


class _Fio(msgspec.Struct):
    jobs: list[_Job]


def fio(text: str, *, bandwidth: bool) -> Reading:
    """From fio's JSON of one job that reads or writes: its IOPS, or its bytes/s."""
    jobs = msgspec.json.decode(_from_brace(text), type=_Fio).jobs
    if len(jobs) != 1:
        raise ValueError(f"fio: {len(jobs)} jobs")
    (job,) = jobs
    if job.error:
        raise ValueError(f"fio failed with errno {job.error}")
    used = job.read if job.read.total_ios else job.write
    if used.total_ios == 0:
        raise ValueError("fio did nothing")
    of = used.clat_ns.percentile
    return Reading(
        used.bw_bytes if bandwidth else used.iops,
        used.total_ios,
        _seconds(of.get("50.000000")),
        _seconds(of.get("99.000000")),
    )


def _seconds(ns: int | None) -> float | None:
    return None if ns is None else ns / 1e9


class _Sum(msgspec.Struct):
    bits_per_second: float


class _IperfEnd(msgspec.Struct):
    sum_received: _Sum | None = None


class _Iperf(msgspec.Struct):
    end: _IperfEnd
    error: str | None = None


def iperf3(text: str) -> Reading:
    """From iperf3's JSON: bit/s as they arrived."""
    result = msgspec.json.decode(_from_brace(text), type=_Iperf)
    if result.error is not None or result.end.sum_received is None:
        raise ValueError(f"iperf3 failed: {result.error}")
    return Reading(result.end.sum_received.bits_per_second)


class _Packets(msgspec.Struct):
    sent: int
    received: int
    ns: int


def pps(text: str) -> Reading:
    """From pps: packets/s as they arrived."""
    result = msgspec.json.decode(text, type=_Packets)
    if result.ns <= 0:
        raise ValueError(f"pps: {result.received} of {result.sent} packets arrived")
    return Reading(result.received / (result.ns / 1e9), result.received)


class _Counted(msgspec.Struct):
    count: int
    ns: int


def vsock(text: str, *, round_trips: bool = False) -> Reading:
    """From vsock measure: how many a second, or the seconds of one round trip."""
    result = msgspec.json.decode(text, type=_Counted)
    if result.ns <= 0 or result.count <= 0:
        raise ValueError(f"vsock: {result.count} in {result.ns} ns")
    seconds = result.ns / 1e9
    return Reading(seconds / result.count if round_trips else result.count / seconds, result.count)


def ping(text: str) -> Reading:
    """From ping: the median round trip in seconds."""
    times = [float(ms) / 1e3 for ms in re.findall(r" time=([\d.]+) ms", text)]
    if len(times) < 2:
        raise ValueError(f"ping: {len(times)} answers")
    times.sort()
    return Reading(statistics.median(times), len(times), p99_s=times[len(times) * 99 // 100])


def interrupts(text: str) -> int:
    """From the virtio lines of /proc/interrupts: how many, on all CPUs."""
    total = 0
    for line in text.splitlines():
        words = line.split()
        if words and words[0].endswith(":"):
            for word in words[1:]:
                if not word.isdigit():
                    break
                total += int(word)
    return total


def packets(text: str) -> int:
    """From the NICs' rx_packets and tx_packets: how many, both ways."""
    return sum(int(n) for n in re.findall(r"/statistics/[rt]x_packets (\d+)", text))


def _from_brace(text: str) -> str:
    """Without the warnings that programs print before their JSON."""
    at = text.find("{")
    if at < 0:
        raise ValueError(f"no JSON in {text[:80]!r}")
    return text[at:]
