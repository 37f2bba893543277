"""TCP, small UDP packets and ping between a guest and its host, beside QEMU and kvmtool."""

from __future__ import annotations

from collections.abc import Iterator

from avmm.bench.guest import rows
from avmm.bench.guest.contenders import (
    AVMM,
    AVMM_THREAD,
    AVMM_VHOST,
    KVMTOOL,
    QEMU,
    QEMU_MICROVM,
    QEMU_VHOST,
)
from avmm.bench.guest.rows import Row
from avmm.bench.guest.turns import take_turns
from avmm.bench.record import Aim, Case
from avmm.bench.suite import Options

SUITE = "net-guest"
CONTENDERS = (AVMM, AVMM_THREAD, AVMM_VHOST, QEMU, QEMU_MICROVM, KVMTOOL, QEMU_VHOST)
_SECONDS_MIN = 2.0
_AIM = 1.3


def cases(options: Options) -> Iterator[Case]:
    """All rows, once every contender has had its turns."""
    results = take_turns(CONTENDERS, rows.NET, options, max(options.seconds, _SECONDS_MIN))
    series = {contender.name: contender.name for contender in CONTENDERS}
    for row in rows.NET:
        case = results.case(SUITE, row, series, _aims(row))
        if case is not None:
            yield case


def _aims(row: Row) -> list[Aim]:
    return [Aim(QEMU.name, _AIM if row.better == "higher" else 1 / _AIM)]
