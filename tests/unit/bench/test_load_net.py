"""Frames through the C driver to a device in this process, and through a socket as bare TAP."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from avmm.native import CData, ffi, lib
from fakes.vdriver_pair import DATA_BYTES, DATA_GPA, Pair, pair

FRAME_BYTES = 64
HEADER = bytes(12)
ETHERTYPE = b"\x88\xb5"


def native(**values: int) -> tuple[CData, CData]:
    load, net = ffi.new("struct av_load *"), ffi.new("struct av_load_net *")
    load.depth, load.duration_ns, load.timeout_ns = 4, 20_000_000, 10 * 10**9
    load.data_gpa, load.data_bytes = DATA_GPA, DATA_BYTES
    net.frame_bytes, net.socket_fd, net.window = FRAME_BYTES, -1, 64
    for name, value in values.items():
        setattr(load if hasattr(load, name) else net, name, value)
    return load, net


def run(p: Pair, load: CData, net: CData, serve: Callable[[], None]) -> CData:
    """Against a device that polls: what `serve` does over and over."""
    ended = threading.Event()

    def device() -> None:
        while not ended.is_set():
            serve()

    thread = threading.Thread(target=device)
    thread.start()
    out = ffi.new("struct av_load_result *")
    error = lib.av_load_net_run(p.driver, p.memory.native, load, net, out)
    ended.set()
    thread.join()
    assert error == 0
    return out


@pytest.fixture
def wire() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends keep frames apart, as a TAP and its interface do."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setblocking(False)
    yield ends
    for end in ends:
        end.close()


def test_every_frame_sent_is_whole_and_counted() -> None:
    with pair(0) as p:
        frames: list[bytes] = []

        def serve() -> None:
            while (chain := p.device.pop()) is not None:
                frames.append(chain.readable)
                p.device.push(chain.head, 0)
            p.device.flush()

        out = run(p, *native(), serve)
        assert out.requests == len(frames) > 0
        assert {(len(f), f[:12], f[24:26]) for f in frames} == {(12 + 64, HEADER, ETHERTYPE)}


def test_frames_put_into_the_wire_are_taken_from_the_device(
    wire: tuple[socket.socket, socket.socket],
) -> None:
    with pair(0) as p:
        lengths: list[int] = []

        def serve() -> None:
            chain = p.device.pop()
            if chain is None:
                return
            try:
                lengths.append(wire[0].recv_into(chain.writable[0]))
            except BlockingIOError:
                lib.av_vring_unpop(p.device.native)
                return
            p.device.push(chain.head, lengths[-1])
            p.device.flush()

        out = run(p, *native(socket_fd=wire[1].fileno()), serve)
        assert 0 < out.requests <= len(lengths)
        assert set(lengths) == {FRAME_BYTES}


def test_a_bare_taps_limit_is_measured_both_ways(
    wire: tuple[socket.socket, socket.socket],
) -> None:
    out = ffi.new("struct av_load_result *")
    load, net = native()
    assert lib.av_load_tap_run(wire[0].fileno(), load, net, out) == 0
    assert out.requests > 0
    assert len(os.read(wire[1].fileno(), 2048)) == 12 + FRAME_BYTES
    # Its thread may not be run for long on a busy host.
    load, net = native(socket_fd=wire[1].fileno(), duration_ns=200_000_000)
    assert lib.av_load_tap_run(wire[0].fileno(), load, net, out) == 0
    assert out.requests > 0
    assert out.elapsed_ns >= load.duration_ns


@pytest.mark.parametrize("values", [{"depth": 0}, {"frame_bytes": 13}, {"data_bytes": 1}])
def test_a_load_of_frames_that_cannot_be_is_refused(values: dict[str, int]) -> None:
    with pair(0) as p:
        out = ffi.new("struct av_load_result *")
        error = lib.av_load_net_run(p.driver, p.memory.native, *native(**values), out)
        assert error == -errno.EINVAL
