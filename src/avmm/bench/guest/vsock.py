"""Bytes, round trips and connections over vsock, beside the host kernel's own back-end."""

from __future__ import annotations

from collections.abc import Iterator

from avmm.bench.guest import rows
from avmm.bench.guest.contenders import AVMM, AVMM_THREAD, QEMU
from avmm.bench.guest.turns import take_turns
from avmm.bench.record import OWN, Aim, Case
from avmm.bench.suite import Options

SUITE = "vsock-guest"
KERNEL = "qemu, vhost-vsock"
_SECONDS_MIN = 1.5


def cases(options: Options) -> Iterator[Case]:
    """All rows, once every contender has had its turns. avmm's host ends are unix sockets, QEMU's
    are the kernel's."""
    contenders = (AVMM, AVMM_THREAD, QEMU)
    results = take_turns(contenders, rows.VSOCK, options, max(options.seconds, _SECONDS_MIN))
    series = {OWN: AVMM.name, AVMM_THREAD.name: AVMM_THREAD.name, KERNEL: QEMU.name}
    for row in rows.VSOCK:
        case = results.case(SUITE, row, series, [Aim(KERNEL, 1.0)])
        if case is not None:
            yield case
