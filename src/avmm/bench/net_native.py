"""Suite net-native: our network back-end over vhost-user, with no VM, in a network of its own.

One queue and 64-byte frames, the least there are, so what counts is the cost of a frame. The
front-end polls. The limit is a loop of read() or write() in C on a TAP of the same kind. Towards
the guest, frames are put into the TAP by a packet socket, in the thread that takes them from the
device; for the limit, a second thread reads them.
"""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from avmm.bench.back_end import AVMM_COMMAND, BackEnd, apart
from avmm.bench.front_end import F_EVENT_IDX, F_INDIRECT_DESC, FrontEnd
from avmm.bench.load import Run, costs, measured
from avmm.bench.namespace import NetworkNamespace
from avmm.bench.record import LIMIT, OWN, Aim, Case
from avmm.bench.suite import Options
from avmm.errors import HostError
from avmm.hostnet.tap import HostTap, TapSettings, open_tap
from avmm.native import CData, ffi, lib

SUITE = "net-native"
FRAME_BYTES = 64
DEPTH = 256
WINDOW = 512
"""Frames on their way into a TAP; its queue holds 1000."""

_F_MRG_RXBUF = 1 << 15
_SOL_PACKET = 263
_PACKET_QDISC_BYPASS = 20
_TIMEOUT_NS = 5 * 10**9
_RX, _TX = 0, 1


@dataclass(frozen=True, slots=True)
class Row:
    """queue: the device's, whose direction is measured."""

    name: str
    queue: int


ROWS = (
    Row("64 B guest to host, 1 queue polled", _TX),
    Row("64 B host to guest, 1 queue polled", _RX),
)


@dataclass(frozen=True, slots=True)
class Bench:
    """What the rows are measured with. The sockets put frames into the interfaces."""

    back_end: BackEnd
    own_socket: socket.socket
    limit_tap: HostTap
    limit_socket: socket.socket


def cases(options: Options) -> Iterator[Case]:
    """See the suite protocol. Needs CAP_NET_ADMIN and CAP_SYS_ADMIN."""
    with ExitStack() as stack:
        network = stack.enter_context(NetworkNamespace())
        bench = network.run(lambda: _set_up(stack))
        for row in ROWS:
            yield network.run(functools.partial(_measure, row, bench, options))


def _set_up(stack: ExitStack) -> Bench:
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="avmm-bench-"))
    path = os.path.join(folder, "net.sock")
    command = [*AVMM_COMMAND, "vhost-user", "net", "--socket", path, "--tap", "own0"]
    back_end = stack.enter_context(BackEnd(OWN, command, path))
    tap = asyncio.run(open_tap(TapSettings("limit0")))
    stack.callback(lambda: asyncio.run(tap.close()))
    return Bench(back_end, _injecting(stack, "own0"), tap, _injecting(stack, "limit0"))


def _injecting(stack: ExitStack, interface: str) -> socket.socket:
    """A socket whose frames go straight into an interface's driver."""
    try:
        packets = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
        packets.setsockopt(_SOL_PACKET, _PACKET_QDISC_BYPASS, 1)
        packets.bind((interface, 0))
    except OSError as e:
        raise HostError("packet-socket", op="bind", path=interface, errno=e.errno) from e
    return packets


def _measure(row: Row, bench: Bench, options: Options) -> Case:
    own: list[Run] = []
    limit: list[Run] = []
    for _ in range(options.runs):
        own.append(_run_own(row, bench, options.seconds))
        limit.append(_run_limit(row, bench, options.seconds))
    return Case(
        suite=SUITE,
        name=row.name,
        unit="packets/s",
        better="higher",
        series={OWN: [run.rate for run in own], LIMIT: [run.rate for run in limit]},
        aims=[Aim(LIMIT, 0.85)],
        costs={OWN: costs(own)},
    )


def _native(row: Row, packets: socket.socket, seconds: float) -> tuple[CData, CData]:
    load, net = ffi.new("struct av_load *"), ffi.new("struct av_load_net *")
    load.depth, load.duration_ns, load.timeout_ns = DEPTH, int(seconds * 1e9), _TIMEOUT_NS
    load.polling = 1
    net.frame_bytes, net.window = FRAME_BYTES, WINDOW
    net.socket_fd = packets.fileno() if row.queue == _RX else -1
    return load, net


def _run_own(row: Row, bench: Bench, seconds: float) -> Run:
    load, net = _native(row, bench.own_socket, seconds)
    room = lib.av_load_net_room(load, net)
    features = F_EVENT_IDX | F_INDIRECT_DESC | _F_MRG_RXBUF
    out = ffi.new("struct av_load_result *")
    path = bench.back_end.path
    with FrontEnd(path, queues=2, features=features, data_bytes=room, counted_by=2) as front:
        load.data_gpa, load.data_bytes = front.data_gpa, front.data_bytes
        with apart(bench.back_end):
            cpu_s = bench.back_end.cpu_s()
            error = lib.av_load_net_run(front.drivers[row.queue], front.memory, load, net, out)
            cpu_s = bench.back_end.cpu_s() - cpu_s
    _raise(error, f"Load on {bench.back_end.name}")
    return measured(out, cpu_s, latencies=False)


def _run_limit(row: Row, bench: Bench, seconds: float) -> Run:
    load, net = _native(row, bench.limit_socket, seconds)
    out = ffi.new("struct av_load_result *")
    _raise(lib.av_load_tap_run(bench.limit_tap.fds[0], load, net, out), "Load on a TAP")
    return Run(rate=out.requests / (out.elapsed_ns / 1e9))


def _raise(error: int, op: str) -> None:
    if error:
        raise HostError("load", op=op, errno=-error)
