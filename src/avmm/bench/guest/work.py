"""Disks, networks and vsock in a guest, beside QEMU and kvmtool: one boot of a contender does the
rows of every suite that is asked for, since a boot takes longer than they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from avmm.bench.guest import rows
from avmm.bench.guest.contenders import (
    AVMM,
    AVMM_THREAD,
    AVMM_VHOST,
    KVMTOOL,
    QEMU,
    QEMU_MICROVM,
    QEMU_VHOST,
    Contender,
)
from avmm.bench.guest.rows import Row
from avmm.bench.guest.turns import Results, take_turns
from avmm.bench.record import BEST, OWN, Aim, Case
from avmm.bench.suite import Options

VHOST_VSOCK = "qemu, vhost-vsock"
_SECONDS_MIN = 1.5
"""Programs in a guest need a while until their rate is even."""
_NET_AIM = 1.3
_ALL = (AVMM, AVMM_THREAD, QEMU, QEMU_MICROVM, KVMTOOL)
_VHOST = (AVMM_VHOST, QEMU_VHOST)
"""Where the host's kernel moves the packets, in rows of their own."""


def _blk(results: Results, row: Row) -> Iterator[Case | None]:
    yield results.case("blk-guest", row, {c.name: c.name for c in _ALL}, [Aim(BEST, 1.2)])


def _net(results: Results, row: Row) -> Iterator[Case | None]:
    aim = Aim(QEMU.name, _NET_AIM if row.better == "higher" else 1 / _NET_AIM)
    yield results.case("net-guest", row, {c.name: c.name for c in _ALL}, [aim])
    yield results.case(
        "net-guest",
        replace(row, title=f"{row.title}, vhost=on"),
        {OWN: AVMM_VHOST.name, QEMU_VHOST.name: QEMU_VHOST.name},
        [Aim(QEMU_VHOST.name, 1.0)],
    )


def _vsock(results: Results, row: Row) -> Iterator[Case | None]:
    """Our host ends are unix sockets, QEMU's are the kernel's."""
    series = {OWN: AVMM.name, AVMM_THREAD.name: AVMM_THREAD.name, VHOST_VSOCK: QEMU.name}
    yield results.case("vsock-guest", row, series, [Aim(VHOST_VSOCK, 1.0)])


@dataclass(frozen=True, slots=True)
class _Load:
    """What a suite has contenders do, and what becomes of a row of it."""

    contenders: Sequence[Contender]
    rows: Sequence[Row]
    cases: Callable[[Results, Row], Iterator[Case | None]]


_LOADS = {
    "blk-guest": _Load(_ALL, rows.BLK, _blk),
    "net-guest": _Load((*_ALL, *_VHOST), rows.NET, _net),
    "vsock-guest": _Load((AVMM, AVMM_THREAD, QEMU), rows.VSOCK, _vsock),
}


def cases(options: Options) -> Iterator[Case]:
    """All rows of options.suites, once every contender has had its turns."""
    loads = [_LOADS[name] for name in options.suites]
    plan = {
        contender: [row for load in loads if contender in load.contenders for row in load.rows]
        for contender in (*_ALL, *_VHOST)
    }
    results = take_turns(
        {contender: found for contender, found in plan.items() if found},
        options,
        max(options.seconds, _SECONDS_MIN),
    )
    for load in loads:
        for row in load.rows:
            yield from (case for case in load.cases(results, row) if case is not None)
