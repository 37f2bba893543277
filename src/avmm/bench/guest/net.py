"""TCP, small UDP packets and ping between a guest and its host, beside QEMU and kvmtool."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

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
from avmm.bench.guest.turns import take_turns
from avmm.bench.record import OWN, Aim, Case
from avmm.bench.suite import Options

SUITE = "net-guest"
CONTENDERS = (AVMM, AVMM_THREAD, QEMU, QEMU_MICROVM, KVMTOOL)
VHOST = (AVMM_VHOST, QEMU_VHOST)
"""Where the host's kernel moves the packets, in rows of their own."""
_SECONDS_MIN = 1.5
_AIM = 1.3


def cases(options: Options) -> Iterator[Case]:
    """All rows, once every contender has had its turns."""
    results = take_turns(
        (*CONTENDERS, *VHOST), rows.NET, options, max(options.seconds, _SECONDS_MIN)
    )
    series = {contender.name: contender.name for contender in CONTENDERS}
    vhost_series = {OWN: AVMM_VHOST.name, QEMU_VHOST.name: QEMU_VHOST.name}
    for row in rows.NET:
        aim = Aim(QEMU.name, _AIM if row.better == "higher" else 1 / _AIM)
        found = [
            results.case(SUITE, row, series, [aim]),
            results.case(
                SUITE,
                replace(row, title=f"{row.title}, vhost=on"),
                vhost_series,
                [Aim(QEMU_VHOST.name, 1.0)],
            ),
        ]
        yield from (case for case in found if case is not None)
