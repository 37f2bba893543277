"""Load by the C driver on a vhost-user back-end, and what one run of it measured."""

from __future__ import annotations

import contextlib
import errno
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields

from avmm.bench.back_end import BackEnd, apart
from avmm.bench.front_end import F_EVENT_IDX, F_INDIRECT_DESC, FrontEnd
from avmm.bench.record import Costs
from avmm.errors import HostError
from avmm.native import CData, ffi, lib

_TIMEOUT_NS = 5 * 10**9

# Of virtio 1.3 section 5.2.3, what Linux's driver takes as well. Without FLUSH a device that keeps
# the rules makes every write durable before it answers.
_BLK_F_FLUSH = 1 << 9
_BLK_F_MQ = 1 << 12
_BLK_FEATURES = F_EVENT_IDX | F_INDIRECT_DESC | _BLK_F_FLUSH | _BLK_F_MQ


@dataclass(frozen=True, slots=True)
class Run:
    """One measurement. rate: requests a second. The rest as in record.Costs."""

    rate: float
    cpu_s_per_request: float | None = None
    driver_cpu_s_per_request: float | None = None
    kicks_per_request: float | None = None
    interrupts_per_request: float | None = None
    p50_s: float | None = None
    p99_s: float | None = None


def costs(runs: Sequence[Run]) -> Costs:
    """The medians of what was measured in every run."""
    values: dict[str, float] = {}
    for name in (field.name for field in fields(Run) if field.name != "rate"):
        measured = [value for run in runs if (value := getattr(run, name)) is not None]
        if measured:
            values[name] = statistics.median(measured)
    return Costs(**values)


@dataclass(frozen=True, slots=True)
class BlkWork:
    """Requests of block_bytes at a depth on each of some queues. polling: of the front-end."""

    block_bytes: int
    depth: int
    queues: int = 1
    write: bool = False
    sequential: bool = False
    polling: bool = False

    @property
    def room_bytes(self) -> int:
        """Shared memory that each queue needs."""
        return int(lib.av_load_blk_room(self.native_load(), self.native_blk(0)))

    def native_load(self) -> CData:
        """Without its limits and its place."""
        load = ffi.new("struct av_load *")
        load.depth, load.polling, load.timeout_ns = self.depth, self.polling, _TIMEOUT_NS
        return load

    def native_blk(self, span_bytes: int, *, verify: bool = False) -> CData:
        """In the first span_bytes of the disk."""
        blk = ffi.new("struct av_load_blk *")
        blk.block_bytes, blk.span_bytes, blk.verify = self.block_bytes, span_bytes, verify
        blk.write, blk.sequential = self.write, self.sequential
        blk.seed = int.from_bytes(os.urandom(4), "little")
        return blk


def run_blk(
    back_end: BackEnd,
    work: BlkWork,
    *,
    span_bytes: int,
    seconds: float = 0.0,
    requests: int = 0,
    verify: bool = False,
    features: int = _BLK_FEATURES,
) -> Run:
    """Over a connection of its own. seconds, requests: see native/load.h. features: as FrontEnd's.

    Raises HostError("back-end") when the device fails a request or returns wrong data.
    """
    out = ffi.new("struct av_load_result *")
    load, blk = work.native_load(), work.native_blk(span_bytes, verify=verify)
    load.duration_ns, load.requests = int(seconds * 1e9), requests
    with FrontEnd(
        back_end.path, queues=work.queues, features=features, data_bytes=work.room_bytes
    ) as front:
        load.data_gpa, load.data_bytes = front.data_gpa, front.data_bytes
        drivers = ffi.new("struct av_vdriver *[]", front.drivers)
        with apart(back_end) if work.queues == 1 else contextlib.nullcontext():
            cpu_s = back_end.cpu_s()
            error = lib.av_load_blk_run(drivers, front.memory, work.queues, load, blk, out)
            cpu_s = back_end.cpu_s() - cpu_s
    if error:
        code = -error
        remedy = "it stopped answering" if code == errno.ETIMEDOUT else None
        raise HostError("back-end", op=f"Load on {back_end.name}", errno=code, remedy=remedy)
    if out.errors or out.mismatches:
        remedy = f"{out.errors} requests failed, {out.mismatches} sectors were wrong"
        raise HostError("back-end", op=f"Load on {back_end.name}", remedy=remedy)
    return measured(out, cpu_s)


def measured(out: CData, cpu_s: float, *, latencies: bool = True) -> Run:
    """From a `struct av_load_result`. cpu_s: what the back-end used meanwhile."""
    count = max(1, out.requests)
    return Run(
        rate=out.requests / (out.elapsed_ns / 1e9),
        cpu_s_per_request=cpu_s / count,
        driver_cpu_s_per_request=out.cpu_ns / 1e9 / count,
        kicks_per_request=out.kicks / count,
        interrupts_per_request=out.interrupts / count,
        p50_s=out.p50_ns / 1e9 if latencies else None,
        p99_s=out.p99_ns / 1e9 if latencies else None,
    )
