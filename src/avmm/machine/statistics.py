"""Counters of one microVM as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec

from avmm.legacy.serial16550 import SerialStatistics
from avmm.machine.vcpu.thread import VcpuStatistics
from avmm.virtio.device import DeviceStatistics
from avmm.virtio.home import HomeStatistics

_DEVICES_MAX: Final = 256
"""Of a worker's, which may say anything: to take in millions of names would keep the loop."""


@dataclass(frozen=True, slots=True)
class MachineStatistics:
    """Counters of one microVM, frozen at the moment of the call; hashable, and JSON by asdict().

    start_s: seconds from start() to the first guest instruction; 0 before.
    devices: by device id, each device's own record. homes: the loop's, then the I/O threads'.
    log_lines_left_out: of what the guest's doing would have written to the log; it has room for
    20 lines at once, and for one more every 10 s.
    """

    state: str
    start_s: float
    vcpus: tuple[VcpuStatistics, ...]
    console: SerialStatistics
    devices: Annotated[Mapping[str, DeviceStatistics], msgspec.Meta(max_length=_DEVICES_MAX)]
    homes: tuple[HomeStatistics, ...]
    log_lines_left_out: int
