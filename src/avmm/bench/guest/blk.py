"""fio in a guest on a disk that costs nothing, beside QEMU and kvmtool on the same one."""

from __future__ import annotations

from collections.abc import Iterator

from avmm.bench.guest import rows
from avmm.bench.guest.contenders import AVMM, AVMM_THREAD, KVMTOOL, QEMU, QEMU_MICROVM
from avmm.bench.guest.turns import take_turns
from avmm.bench.record import BEST, Aim, Case
from avmm.bench.suite import Options

SUITE = "blk-guest"
CONTENDERS = (AVMM, AVMM_THREAD, QEMU, QEMU_MICROVM, KVMTOOL)
_SECONDS_MIN = 1.5
"""fio in a guest needs a while until its rate is even."""


def cases(options: Options) -> Iterator[Case]:
    """All rows, once every contender has had its turns."""
    results = take_turns(CONTENDERS, rows.BLK, options, max(options.seconds, _SECONDS_MIN))
    series = {contender.name: contender.name for contender in CONTENDERS}
    for row in rows.BLK:
        case = results.case(SUITE, row, series, [Aim(BEST, 1.2)])
        if case is not None:
            yield case
