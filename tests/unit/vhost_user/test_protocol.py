"""Front-ends that break the rules: each loses its connection, and nothing else is lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from avmm.vhost_user.message import PAYLOAD_BYTES_MAX, Request
from avmm.vhost_user.server import VhostUserServer
from avmm.virtio import features
from avmm.virtio.devices.blk import Disk
from fakes.blk_driver import IN, OK, BlkDriver
from fakes.front_end import MEMORY_BYTES, UVA, FrontEnd, front_end, memory_table, state, u64
from fakes.mmio_driver import eventually, settle
from linux.holdings import Holdings

ADDRESSES = struct.Struct("<IIQQQQ")


@pytest.fixture
async def server(image: Path, socket_path: str) -> AsyncIterator[VhostUserServer]:
    async with VhostUserServer(Disk(str(image)), socket_path) as server:
        yield server


async def serves(server: VhostUserServer) -> None:
    """The server still does its work, for the next front-end."""
    async with front_end(server.socket_path) as end:
        await end.start()
        assert (await BlkDriver(end).request(IN, read_bytes=512))[0] == OK


async def refused(server: VhostUserServer, misdeed: Callable[[FrontEnd], Awaitable[None]]) -> None:
    """The connection is closed, what came with it as well, and the next one is served."""
    await serves(server)
    before = Holdings.now()
    async with front_end(server.socket_path) as end:
        await misdeed(end)
        assert await end.closed()
    await serves(server)
    async with front_end(server.socket_path) as end:
        await end.negotiate()  # answered: so the front-end before has been let go of
    await eventually(lambda: not Holdings.now().beyond(before))


MESSAGES: dict[str, tuple[int, bytes, int, dict[str, int]]] = {
    "another version": (Request.GET_FEATURES, b"", 0, {"flags": 2}),
    "a reply": (Request.GET_FEATURES, b"", 0, {"flags": 1 | 1 << 2}),
    "too long": (Request.SET_FEATURES, u64(0), 0, {"size_bytes": 0xFFFF_FFFF}),
    "too short": (Request.SET_VRING_ADDR, bytes(8), 0, {}),
    "too many descriptors": (Request.SET_VRING_KICK, u64(0), 2, {}),
    "far too many descriptors": (Request.SET_VRING_KICK, u64(0), 20, {}),
    "too few descriptors": (Request.SET_VRING_KICK, u64(0), 0, {}),
    "descriptors nobody asked for": (Request.GET_FEATURES, b"", 3, {}),
    "an unknown request with descriptors": (9999, b"abc", 5, {}),
    "a ring that is not there": (Request.SET_VRING_NUM, state(200, 64), 0, {}),
    "kicks by what is no eventfd": (Request.SET_VRING_KICK, u64(0), 1, {}),
    "calls by what is no eventfd": (Request.SET_VRING_CALL, u64(0), 1, {}),
    "errors by what is no eventfd": (Request.SET_VRING_ERR, u64(0), 1, {}),
    "requests to what is no socket": (Request.SET_BACKEND_REQ_FD, b"", 1, {}),
    "polling without kicks": (Request.SET_VRING_KICK, u64(1 << 8), 0, {}),
    "features that are not offered": (Request.SET_FEATURES, u64(1 << 63), 0, {}),
    "protocol features that are not": (Request.SET_PROTOCOL_FEATURES, u64(1 << 1), 0, {}),
    "fewer descriptors than regions": (
        Request.SET_MEM_TABLE,
        memory_table((0, 4096, 0, 0), (4096, 4096, 4096, 0)),
        1,
        {},
    ),
    "memory that is no file": (Request.SET_MEM_TABLE, memory_table((0, 4096, 0, 0)), 1, {}),
    "configuration outside of the space": (
        Request.GET_CONFIG,
        struct.pack("<III", 4000, 1, 0) + b"\0",
        0,
        {},
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
async def test_a_bad_message_ends_the_connection(server: VhostUserServer, name: str) -> None:
    request, payload, fds, header = MESSAGES[name]
    pipe = os.pipe()
    extra = [os.dup(pipe[0]) for _ in range(fds)]

    async def misdeed(end: FrontEnd) -> None:
        await end.negotiate()
        end.send(request, payload, extra, **header)

    try:
        await refused(server, misdeed)
    finally:
        for fd in (*pipe, *extra):
            os.close(fd)


async def test_an_unknown_request_may_be_asked_about(server: VhostUserServer) -> None:
    async with front_end(server.socket_path) as end:
        await end.negotiate()
        assert await end.do(9999, bytes(PAYLOAD_BYTES_MAX)) == 1
        assert await end.ask_u64(Request.GET_QUEUE_NUM) == len(server.device.queues)


async def test_a_refused_request_is_answered_first(server: VhostUserServer) -> None:
    async def misdeed(end: FrontEnd) -> None:
        await end.negotiate()
        assert await end.do(Request.SET_FEATURES, u64(1 << 63)) == 1

    await refused(server, misdeed)


async def test_a_legacy_driver_is_refused(server: VhostUserServer) -> None:
    async def misdeed(end: FrontEnd) -> None:
        with pytest.raises(AssertionError):
            await end.start(accepted=features.RING_INDIRECT_DESC)

    await refused(server, misdeed)


async def test_a_connection_that_ends_inside_of_a_message(server: VhostUserServer) -> None:
    for cut in (1, 4, 11, 12, 13, 19):
        async with front_end(server.socket_path) as end:
            end.socket.send((struct.pack("<III", Request.SET_FEATURES, 1, 8) + bytes(8))[:cut])
    await serves(server)


async def test_a_message_may_come_in_pieces(server: VhostUserServer) -> None:
    async with front_end(server.socket_path) as end:
        await end.negotiate()
        for byte in struct.pack("<III", Request.GET_QUEUE_NUM, 1, 0):
            end.socket.send(bytes([byte]))
            await asyncio.sleep(0)
        assert (await end.receive())[0] == Request.GET_QUEUE_NUM


RINGS: dict[str, tuple[int, tuple[int, int, int], int]] = {
    "no entries": (0, (0x10000, 0x20000, 0x30000), 0),
    "no power of two": (63, (0x10000, 0x20000, 0x30000), 0),
    "too many entries": (0x10000, (0x10000, 0x20000, 0x30000), 0),
    "unaligned": (64, (0x10001, 0x20000, 0x30000), 0),
    "across the end of memory": (64, (MEMORY_BYTES - 16, 0x20000, 0x30000), 0),
    "outside of memory": (64, (0x10000, MEMORY_BYTES, 0x30000), 0),
    "below memory": (64, (0x10000, 0x20000, -1), 0),
    "a base that is none": (64, (0x10000, 0x20000, 0x30000), 0x10000),
}


@pytest.mark.parametrize("name", RINGS)
async def test_a_ring_that_cannot_be_is_refused(server: VhostUserServer, name: str) -> None:
    size, places, base = RINGS[name]
    fds = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(2)]

    async def misdeed(end: FrontEnd) -> None:
        await end.negotiate(features.VERSION_1)
        assert await end.set_memory() == 0
        assert await end.do(Request.SET_VRING_NUM, state(0, size)) == 0
        assert await end.do(Request.SET_VRING_BASE, state(0, base)) == 0
        addresses = ADDRESSES.pack(0, 0, *(UVA + place for place in places), 0)
        assert await end.do(Request.SET_VRING_ADDR, addresses) == 0
        assert await end.do(Request.SET_VRING_CALL, u64(0), fds[:1]) == 0
        assert await end.do(Request.SET_VRING_KICK, u64(0), fds[1:]) == 0
        assert await end.do(Request.SET_VRING_ENABLE, state(0, 1)) == 1

    await refused(server, misdeed)
    for fd in fds:
        os.close(fd)


async def test_a_ring_without_memory_or_addresses_is_refused(server: VhostUserServer) -> None:
    kick = os.eventfd(0, os.EFD_CLOEXEC)

    async def misdeed(end: FrontEnd) -> None:
        await end.negotiate()
        assert await end.do(Request.SET_VRING_KICK, u64(0), [kick]) == 0
        assert await end.do(Request.SET_VRING_ENABLE, state(0, 1)) == 1

    await refused(server, misdeed)
    os.close(kick)


@pytest.mark.parametrize("request_", [Request.SET_VRING_NUM, Request.SET_VRING_BASE])
async def test_a_running_ring_is_not_set_up(server: VhostUserServer, request_: Request) -> None:
    async def misdeed(end: FrontEnd) -> None:
        await end.start()
        assert await end.do(request_, state(0, 8)) == 1

    await refused(server, misdeed)


async def test_a_bad_table_under_a_running_ring_ends_it(server: VhostUserServer) -> None:
    async def misdeed(end: FrontEnd) -> None:
        await end.start()
        table = memory_table((0, 2 * MEMORY_BYTES, UVA, 0))
        assert await end.do(Request.SET_MEM_TABLE, table, [end.memfd]) == 1

    await refused(server, misdeed)


async def test_a_kick_descriptor_that_is_full_stalls_nobody(server: VhostUserServer) -> None:
    async with front_end(server.socket_path) as end:
        await end.start()
        for fd in (end.kicks[0], end.calls[0]):
            os.set_blocking(fd, True)
            os.eventfd_write(fd, 2**64 - 2)
        assert await end.do(Request.SET_VRING_ENABLE, state(0, 0)) == 0
        assert await end.do(Request.SET_VRING_KICK, u64(0), [end.kicks[0]]) == 0
        assert await end.do(Request.SET_VRING_CALL, u64(0), [end.calls[0]]) == 0
        blk = BlkDriver(end)
        slot = blk.submit(IN, read_bytes=512)
        assert await end.do(Request.SET_VRING_ENABLE, state(0, 1)) == 0
        await end.used(0)
        assert blk.status(slot) == OK


def pick(rng: random.Random, good: int, *bad: int) -> int:
    """`good` nearly always: nobody would get far otherwise."""
    return rng.choice(bad) if rng.random() < 0.03 else good


def random_message(rng: random.Random, end: FrontEnd) -> tuple[int, bytes, list[int]]:
    """One that is in order more often than not."""
    request = rng.choice(list(Request))
    index = pick(rng, 0, 1, 255)
    match request:
        case Request.SET_FEATURES:
            return request, u64(pick(rng, end.negotiated, 1 << 32, 0, 2**64 - 1)), []
        case Request.SET_PROTOCOL_FEATURES:
            return request, u64(pick(rng, 0, 1 << 3, 2**64 - 1)), []
        case Request.SET_MEM_TABLE:
            size = pick(rng, MEMORY_BYTES, 4096, 0, 2**63)
            return request, memory_table((0, size, UVA, 0)), [end.memfd]
        case Request.SET_VRING_ADDR:
            at = UVA + pick(rng, 0, 0x1000, 0x8000, 1, MEMORY_BYTES, -4096)
            return request, ADDRESSES.pack(index, 0, at, at + 0x10000, at + 0x20000, 0), []
        case Request.SET_VRING_KICK | Request.SET_VRING_CALL | Request.SET_VRING_ERR:
            return request, u64(index), [pick(rng, end.kicks[0], end.memfd)]
        case Request.GET_CONFIG | Request.SET_CONFIG:
            return request, struct.pack("<III", pick(rng, 32, 0, 255), 1, 0) + b"\1", []
        case Request.GET_INFLIGHT_FD | Request.SET_INFLIGHT_FD:
            fds = [end.memfd] if request is Request.SET_INFLIGHT_FD else []
            where = (MEMORY_BYTES, 0, pick(rng, 1, 0, 100), pick(rng, 64, 0, 3, 1025))
            return request, struct.pack("<QQHH", *where), fds
        case Request.SET_VRING_NUM | Request.SET_VRING_BASE | Request.GET_VRING_BASE:
            return request, state(index, pick(rng, 64, 0, 3, 2**32 - 1)), []
        case Request.SET_VRING_ENABLE:
            return request, state(index, pick(rng, 1, 0)), []
    return request, b"", []


WHILE_STOPPED = (Request.SET_VRING_NUM, Request.SET_VRING_BASE, Request.SET_INFLIGHT_FD)


@pytest.mark.parametrize("seed", range(4))
async def test_front_ends_that_say_anything(server: VhostUserServer, seed: int) -> None:
    rng = random.Random(seed)
    chains = 0
    for _ in range(20):
        async with front_end(server.socket_path) as end:
            await end.start()
            blk = BlkDriver(end)
            for _ in range(3):
                blk.submit(IN, read_bytes=512)
            with contextlib.suppress(ConnectionError, BlockingIOError):
                for _ in range(60):
                    request, payload, fds = random_message(rng, end)
                    if request in WHILE_STOPPED:
                        end.send(Request.GET_VRING_BASE, state(0, 0))
                    end.send(request, payload, fds)
                    end.memory.write(0x10000 + rng.randrange(0x1000), rng.randbytes(8))
                    end.kick(0)
                    await settle()
        chains = max(chains, server.statistics().device.queues[0].chains)
    assert chains
    await serves(server)
