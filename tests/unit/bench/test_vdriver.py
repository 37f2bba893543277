"""The C driver against the native ring, and the load generator against a device in Python."""

from __future__ import annotations

import errno
import os
import random
import threading

import pytest

from avmm.bench.front_end import (
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    F_RING_PACKED,
)
from avmm.mem.guest import GuestMemory
from avmm.native import CData, ffi, lib
from avmm.units import MIB
from fakes.blk_back_end import serve_blk
from fakes.vdriver_pair import DATA_BYTES, DATA_GPA, Pair, pair, setup_of

FEATURES = [
    pytest.param(packed | event_idx | indirect, id="-".join(filter(None, names)))
    for packed, format in ((0, "split"), (F_RING_PACKED, "packed"))
    for event_idx, event in ((0, ""), (F_EVENT_IDX, "event-idx"))
    for indirect, table in ((0, ""), (F_INDIRECT_DESC, "indirect"))
    for names in [(format, event, table)]
]


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("seed", range(4))
def test_what_is_added_arrives_and_comes_back_on_random_histories(features: int, seed: int) -> None:
    chance = random.Random(seed)
    with pair(features) as p:
        added: dict[int, tuple[bytes, list[int]]] = {}
        popped: list[tuple[int, int, int]] = []  # head, token, room
        waiting: list[int] = []
        for token in range(2000):
            readable, writable = chance.randint(0, 2), chance.randint(0, 2)
            if readable + writable:
                texts = [chance.randbytes(chance.randint(1, 40)) for _ in range(readable)]
                rooms = [chance.randint(1, 40) for _ in range(writable)]
                gpas = [DATA_GPA + 64 * (4 * (token % 64) + at) for at in range(4)]
                for gpa, text in zip(gpas, texts, strict=False):
                    p.memory.write(gpa, text)
                sizes = [*map(len, texts), *rooms]
                segments = list(zip(gpas, sizes, strict=False))
                if p.add(token, *segments, readable=readable):
                    added[token] = (b"".join(texts), rooms)
                    waiting.append(token)
            if chance.random() < 0.5:
                lib.av_vdriver_publish(p.driver)
                while (chain := p.device.pop()) is not None:
                    token_of = waiting.pop(0)
                    rooms = [len(room) for room in chain.writable]
                    assert (chain.readable, rooms) == added[token_of]
                    popped.append((chain.head, token_of, sum(rooms)))
                chance.shuffle(popped)
                back = [popped.pop() for _ in range(chance.randint(0, len(popped)))]
                for head, _, room in back:
                    p.device.push(head, room)
                p.device.flush()
                assert [p.take() for _ in back] == [(token, room) for _, token, room in back]
            assert p.take() is None
        assert p.statistics().taken > 500


@pytest.mark.parametrize("features", FEATURES)
def test_the_device_is_kicked_when_it_asks_and_not_otherwise(features: int) -> None:
    with pair(features) as p:
        p.add(1, (DATA_GPA, 8), readable=1)
        assert lib.av_vdriver_publish(p.driver) == 1
        assert os.eventfd_read(p.kick_fd) == 1
        lib.av_vring_kicks_off(p.device.native)
        p.add(2, (DATA_GPA, 8), readable=1)
        assert lib.av_vdriver_publish(p.driver) == 0
        while p.device.pop():
            pass
        assert not lib.av_vring_kicks_on(p.device.native)
        p.add(3, (DATA_GPA, 8), readable=1)
        p.add(4, (DATA_GPA, 8), readable=1)
        assert lib.av_vdriver_publish(p.driver) == 1
        assert lib.av_vdriver_publish(p.driver) == 0  # nothing new
        assert (p.statistics().kicks, p.statistics().kicks_suppressed) == (2, 1)


@pytest.mark.parametrize("features", FEATURES)
def test_the_driver_is_interrupted_when_it_asks_and_not_otherwise(features: int) -> None:
    with pair(features) as p:

        def serve() -> None:
            p.add(7, (DATA_GPA, 8), readable=1)
            lib.av_vdriver_publish(p.driver)
            chain = p.device.pop()
            assert chain is not None
            p.device.push(chain.head, 0)
            p.device.flush()

        assert lib.av_vdriver_interrupts_on(p.driver) == 0
        serve()
        assert lib.av_vdriver_wait(p.driver) == 0
        lib.av_vdriver_interrupts_off(p.driver)
        serve()
        assert p.device.interrupt.count == 1
        assert lib.av_vdriver_interrupts_on(p.driver) == 1  # there is something to take
        assert [p.take(), p.take(), p.take()] == [(7, 0), (7, 0), None]
        assert lib.av_vdriver_interrupts_on(p.driver) == 0
        serve()
        assert p.device.interrupt.count == 2


def test_a_full_ring_takes_no_more() -> None:
    with pair(0, size=4) as p:
        assert p.add(0, (DATA_GPA, 1), (DATA_GPA, 1), (DATA_GPA, 1), readable=1)
        assert not p.add(1, (DATA_GPA, 1), (DATA_GPA, 1), readable=1)
        assert p.add(2, (DATA_GPA, 1), readable=0)
        assert not p.add(3, (DATA_GPA, 1), readable=0)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("size", 0, errno.EINVAL),
        ("size", 6, errno.EINVAL),
        ("size", 2048, errno.EINVAL),
        ("desc_gpa", 8, errno.EINVAL),
        ("device_gpa", 4 * MIB, errno.EFAULT),
        ("table_gpa", 4 * MIB, errno.EFAULT),
    ],
)
def test_a_bad_setup_is_refused(name: str, value: int, error: int) -> None:
    memory = GuestMemory.create(4 * MIB)
    setup = setup_of(memory, 8, F_INDIRECT_DESC)
    setattr(setup, name, value)
    code = ffi.new("int *")
    assert not lib.av_vdriver_create(setup, code)
    assert code[0] == -error
    memory.close()


def load_of(**values: int) -> CData:
    load = ffi.new("struct av_load *")
    load.depth, load.requests, load.timeout_ns = 4, 200, 10 * 10**9
    load.data_gpa, load.data_bytes = DATA_GPA, DATA_BYTES
    for name, value in values.items():
        setattr(load, name, value)
    return load


def blk_of(**values: int) -> CData:
    blk = ffi.new("struct av_load_blk *")
    blk.block_bytes, blk.span_bytes, blk.seed = 4096, 256 * 1024, 1
    for name, value in values.items():
        setattr(blk, name, value)
    return blk


def stamped_disk(size_bytes: int = 256 * 1024) -> bytearray:
    disk = bytearray(size_bytes)
    lib.av_load_stamp_sectors(ffi.from_buffer("uint8_t[]", disk), size_bytes, 0)
    return disk


def run_load(p: Pair, disk: bytearray, load: CData, blk: CData) -> tuple[int, CData]:
    """Against a device thread of its own, which ends with a kick of ours."""
    ended = threading.Event()
    device = threading.Thread(target=serve_blk, args=(p.device, disk, ended.is_set))
    device.start()
    out = ffi.new("struct av_load_result *")
    drivers = ffi.new("struct av_vdriver *[]", [p.driver])
    error = lib.av_load_blk_run(drivers, p.memory.native, 1, load, blk, out)
    ended.set()
    os.eventfd_write(p.kick_fd, 1)
    device.join()
    return error, out


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("polling", [0, 1])
@pytest.mark.parametrize("sequential", [0, 1])
def test_a_load_reads_every_request_and_checks_it(
    features: int, polling: int, sequential: int
) -> None:
    with pair(features, size=16) as p:
        blk = blk_of(verify=1, sequential=sequential)
        error, out = run_load(p, stamped_disk(), load_of(polling=polling), blk)
        assert (error, out.requests, out.errors, out.mismatches) == (0, 200, 0, 0)
        assert 0 < out.kicks <= 200
        assert 0 < out.p50_ns <= out.p99_ns
        # None at all when the device is always done before the driver would sleep.
        assert out.interrupts <= (0 if polling else out.requests)


def test_a_load_notices_wrong_data_and_bad_status() -> None:
    with pair(0, size=16) as p:
        disk = stamped_disk()
        disk[512 * 3] ^= 1
        error, out = run_load(p, disk, load_of(requests=64), blk_of(verify=1, sequential=1))
        assert (error, out.requests, out.mismatches) == (0, 64, 1)


def test_what_a_load_writes_bears_its_stamps() -> None:
    with pair(0, size=16) as p:
        disk = bytearray(256 * 1024)
        error, out = run_load(p, disk, load_of(requests=64), blk_of(write=1, sequential=1))
        assert (error, out.requests, out.errors) == (0, 64, 0)
        expected = stamped_disk()
        assert all(disk[at : at + 8] == expected[at : at + 8] for at in range(0, len(disk), 512))


def test_a_load_ends_by_its_time() -> None:
    with pair(F_EVENT_IDX, size=16) as p:
        load = load_of(requests=0, duration_ns=1_000_000)
        error, out = run_load(p, stamped_disk(), load, blk_of())
        assert error == 0
        assert out.elapsed_ns >= 1_000_000


@pytest.mark.slow  # the least time after which a device is given up is a second
@pytest.mark.parametrize("polling", [0, 1])
def test_a_device_that_does_not_answer_is_given_up(polling: int) -> None:
    with pair(0, size=16) as p:
        out = ffi.new("struct av_load_result *")
        drivers = ffi.new("struct av_vdriver *[]", [p.driver])
        load = load_of(timeout_ns=1, polling=polling)
        error = lib.av_load_blk_run(drivers, p.memory.native, 1, load, blk_of(), out)
        assert (error, out.requests) == (-errno.ETIMEDOUT, 0)


@pytest.mark.parametrize(
    ("load", "blk"),
    [
        ({"depth": 0}, {}),
        ({"data_bytes": 4096}, {}),
        ({}, {"block_bytes": 0}),
        ({}, {"block_bytes": 1000}),
        ({}, {"span_bytes": 0}),
    ],
)
def test_a_load_that_cannot_be_is_refused(load: dict[str, int], blk: dict[str, int]) -> None:
    with pair(0) as p:
        out = ffi.new("struct av_load_result *")
        drivers = ffi.new("struct av_vdriver *[]", [p.driver])
        error = lib.av_load_blk_run(
            drivers, p.memory.native, 1, load_of(**load), blk_of(**blk), out
        )
        assert error == -errno.EINVAL
