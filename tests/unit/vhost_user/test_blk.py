"""A disk over vhost-user: requests, rings that stop and go on, front-ends that come and go."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import pytest

from avmm.units import KIB, MIB
from avmm.vhost_user.message import Request
from avmm.vhost_user.server import VhostUserServer
from avmm.virtio import features
from avmm.virtio.devices.blk import BlkDevice, Disk
from fakes.blk_driver import FLUSH, GET_ID, IN, OK, OUT, BlkDriver
from fakes.driver_queue import driver_queue
from fakes.front_end import UVA, front_end, state, u64
from fakes.mmio_driver import readable

DATA = os.urandom(60 * KIB)


def contents(image: Path) -> bytes:
    return image.read_bytes()


async def test_reads_writes_and_flushes(server: VhostUserServer, image: Path) -> None:
    before = contents(image)
    async with front_end(server.socket_path) as end:
        await end.start()
        blk = BlkDriver(end)
        assert await blk.request(IN, 8, read_bytes=4 * KIB) == (OK, before[4 * KIB : 8 * KIB])
        assert await blk.request(OUT, 16, DATA) == (OK, b"")
        assert await blk.request(FLUSH) == (OK, b"")
        assert contents(image)[8 * KIB : 8 * KIB + len(DATA)] == DATA
        assert (await blk.request(GET_ID, read_bytes=20))[1] == b"served".ljust(20, b"\0")


async def test_without_event_idx_and_with_few_features(server: VhostUserServer) -> None:
    async with front_end(server.socket_path) as end:
        await end.start(accepted=features.VERSION_1 | features.BLK_FLUSH)
        blk = BlkDriver(end)
        for sector in range(200):
            assert (await blk.request(IN, sector, read_bytes=512))[0] == OK


async def test_many_at_once(server: VhostUserServer, image: Path) -> None:
    async with front_end(server.socket_path) as end:
        await end.start(size=256)
        blk = BlkDriver(end)
        slots = [blk.submit(OUT, 8 * at, bytes([at]) * 4096) for at in range(30)]
        blk.kick()
        await end.used(0, 30)
        assert [blk.status(slot) for slot in slots] == [OK] * 30
    assert contents(image)[: 30 * 4096] == b"".join(bytes([at]) * 4096 for at in range(30))


async def test_a_ring_goes_on_where_it_stood(server: VhostUserServer) -> None:
    async with front_end(server.socket_path) as end:
        await end.start()
        blk = BlkDriver(end)
        for _ in range(70):  # the ring has 64 entries
            assert (await blk.request(IN, read_bytes=512))[0] == OK
        base = await end.stop_ring(0)
        assert base == end.queues[0].base
        slot = blk.submit(IN, read_bytes=512)
        blk.kick()
        assert await end.do(Request.SET_VRING_NUM, state(0, 64)) == 0
        assert blk.status(slot) == 0xFF
        await end.start_ring(0, base)
        await end.used(0)
        assert blk.status(slot) == OK


async def test_a_ring_that_never_ran_stands_where_it_was_put(server: VhostUserServer) -> None:
    async with front_end(server.socket_path) as end:
        await end.start()
        assert (await BlkDriver(end).request(IN, read_bytes=512))[0] == OK
    async with front_end(server.socket_path) as end:
        await end.negotiate()
        assert await end.stop_ring(0) == 0
        assert await end.do(Request.SET_VRING_BASE, state(0, 7)) == 0
        assert await end.stop_ring(0) == 7


async def test_nothing_is_in_flight_when_a_ring_has_stopped(server: VhostUserServer) -> None:
    async with front_end(server.socket_path) as end:
        await end.start(size=256)
        blk = BlkDriver(end)
        slots = [blk.submit(OUT, 8 * at, bytes([at]) * 4096) for at in range(32)]
        blk.kick()
        base = await end.stop_ring(0)
        done = [slot for slot in slots if blk.status(slot) == OK]
        assert len(end.queues[0].take_used()) == len(done)
        assert base == end.queues[0].base
        await end.start_ring(0, base)
        await end.used(0, 32 - len(done))
        assert [blk.status(slot) for slot in slots] == [OK] * 32


async def test_a_disabled_ring_rests(server: VhostUserServer) -> None:
    async with front_end(server.socket_path) as end:
        await end.start()
        blk = BlkDriver(end)
        assert (await blk.request(IN, read_bytes=512))[0] == OK
        assert await end.do(Request.SET_VRING_ENABLE, state(0, 0)) == 0
        slot = blk.submit(IN, read_bytes=512)
        blk.kick()
        await end.ask(Request.GET_QUEUE_NUM)
        assert blk.status(slot) == 0xFF
        assert await end.do(Request.SET_VRING_ENABLE, state(0, 1)) == 0
        await end.used(0)
        assert blk.status(slot) == OK


async def test_memory_may_move_while_the_ring_runs(server: VhostUserServer) -> None:
    async with front_end(server.socket_path) as end:
        await end.start()
        blk = BlkDriver(end)
        slots = [blk.submit(OUT, 8 * at, bytes([at]) * 4096) for at in range(10)]
        blk.kick()
        # The ring is where it was, and its address in the front-end is another: only when that
        # is said as well does the ring go on.
        assert await end.set_memory() == 0
        await end.used(0, 10)
        assert [blk.status(slot) for slot in slots] == [OK] * 10
        base = await end.stop_ring(0)
        assert await end.set_memory(uva=UVA // 2) == 0
        assert await end.do(Request.SET_VRING_ADDR, end.addresses(0, UVA // 2)) == 0
        assert await end.do(Request.SET_VRING_BASE, state(0, base)) == 0
        assert await end.do(Request.SET_VRING_KICK, u64(0), [end.kicks[0]]) == 0
        assert (await blk.request(IN, read_bytes=512))[0] == OK


async def test_descriptors_may_be_replaced_while_the_ring_runs(server: VhostUserServer) -> None:
    async with front_end(server.socket_path) as end:
        await end.start()
        blk = BlkDriver(end)
        for fds, request in (
            (end.kicks, Request.SET_VRING_KICK),
            (end.calls, Request.SET_VRING_CALL),
        ):
            os.close(fds[0])
            fds[0] = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            assert await end.do(request, u64(0), [fds[0]]) == 0
            assert (await blk.request(IN, read_bytes=512))[0] == OK


async def test_interrupts_that_nobody_wants(server: VhostUserServer) -> None:
    async with front_end(server.socket_path) as end:
        await end.start()
        blk = BlkDriver(end)
        assert await end.do(Request.SET_VRING_CALL, u64(0 | 1 << 8)) == 0
        slot = blk.submit(IN, read_bytes=512)
        blk.kick()
        base = await end.stop_ring(0)
        assert blk.status(slot) == (OK if end.queues[0].take_used() else 0xFF)
        assert base == end.queues[0].base
        with pytest.raises(BlockingIOError):
            os.eventfd_read(end.calls[0])


async def test_front_ends_come_and_go(server: VhostUserServer, image: Path) -> None:
    for at in range(5):
        async with front_end(server.socket_path) as end:
            await end.start()
            blk = BlkDriver(end)
            assert await blk.request(OUT, at, bytes([at]) * 512) == (OK, b"")
    assert contents(image)[: 5 * 512] == b"".join(bytes([at]) * 512 for at in range(5))
    assert server.statistics().connections == 5


async def test_a_front_end_that_leaves_in_mid_request(server: VhostUserServer, image: Path) -> None:
    before = contents(image)
    async with front_end(server.socket_path) as end:
        await end.start(size=256)
        blk = BlkDriver(end)
        for at in range(30):
            blk.submit(OUT, 8 * at, bytes([at]) * 4096)
        blk.kick()
    async with front_end(server.socket_path) as end:
        await end.start()
        assert (await BlkDriver(end).request(IN, read_bytes=512))[0] == OK
    # Each was done or dropped, none by halves.
    after = contents(image)
    for at in range(30):
        block = slice(4096 * at, 4096 * (at + 1))
        assert after[block] in (bytes([at]) * 4096, before[block])


async def test_the_configuration_space(server: VhostUserServer) -> None:
    async with front_end(server.socket_path) as end:
        await end.start()
        answer = await end.ask(Request.GET_CONFIG, struct.pack("<III", 0, 100, 0) + bytes(100))
        assert answer[:12] == struct.pack("<III", 0, 100, 0)
        config = server.device.config.data
        assert answer[12:] == config.ljust(100, b"\0")
        assert config[32] == 1
        off = struct.pack("<III", 32, 1, 0) + b"\0"
        assert await end.do(Request.SET_CONFIG, off) == 0
        assert server.device.config.data[32] == 0
        assert await end.do(Request.RESET_DEVICE) == 0
        assert server.device.config.data[32] == 1


async def test_a_disk_that_grows_is_announced(server: VhostUserServer, image: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        async with front_end(server.socket_path) as end:
            await end.start()
            assert await end.do(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()]) == 0
            theirs.close()
            os.truncate(image, 3 * MIB)
            assert isinstance(server.device, BlkDevice)
            server.device.resize()
            await readable(ours.fileno())
            assert struct.unpack("<III", ours.recv(100)) == (2, 1, 0)
            read = struct.pack("<III", 0, 8, 0) + bytes(8)
            answer = await end.ask(Request.GET_CONFIG, read)
            assert answer[12:] == struct.pack("<Q", 3 * MIB // 512)
        await readable(ours.fileno())
        assert ours.recv(100) == b""


async def test_a_new_driver_in_the_same_connection(server: VhostUserServer) -> None:
    async with front_end(server.socket_path) as end:
        await end.start()
        assert (await BlkDriver(end).request(IN, read_bytes=512))[0] == OK
        await end.stop_ring(0)
        end.queues.clear()
        for fd in (end.kicks.pop(), end.calls.pop()):
            os.close(fd)
        await end.start(accepted=features.VERSION_1)
        assert server.device.state.features == features.VERSION_1
        assert (await BlkDriver(end).request(IN, read_bytes=512))[0] == OK


async def test_a_broken_ring_is_announced_and_starts_anew(server: VhostUserServer) -> None:
    async with front_end(server.socket_path) as end:
        await end.start()
        error_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        assert await end.do(Request.SET_VRING_ERR, u64(0), [error_fd]) == 0
        kind = end.queues[0].offer_broken()
        end.kick(0)
        end.calls.append(error_fd)
        await readable(error_fd)
        assert server.device.statistics().last_fault == kind
        await end.stop_ring(0)
        end.queues[0] = driver_queue(end.memory, end.queues[0].desc_gpa, 64, end.negotiated)
        await end.start_ring(0)
        assert (await BlkDriver(end).request(IN, read_bytes=512))[0] == OK


async def test_queues_do_not_wait_for_each_other(image: Path, socket_path: str) -> None:
    disk = Disk(str(image), queues=3)
    async with (
        VhostUserServer(disk, socket_path, io_threads=2) as server,
        front_end(server.socket_path) as end,
    ):
        await end.start(3)
        assert await end.ask_u64(Request.GET_QUEUE_NUM) == 3
        assert end.negotiated & features.BLK_MQ
        blk = BlkDriver(end)
        for queue in range(3):
            assert (await blk.request(IN, read_bytes=512, queue=queue))[0] == OK
        await end.stop_ring(1)
        for queue in (0, 2):
            assert (await blk.request(IN, read_bytes=512, queue=queue))[0] == OK


async def test_pinned_memory_goes_with_its_front_end(image: Path, socket_path: str) -> None:
    disk = Disk(str(image), pinned=True)
    async with VhostUserServer(disk, socket_path, io_threads=1):
        for sector in range(3):
            async with front_end(socket_path) as end:
                await end.start()
                blk = BlkDriver(end)
                for _ in range(2):
                    read = await blk.request(IN, sector, read_bytes=512)
                    assert read == (OK, contents(image)[512 * sector : 512 * (sector + 1)])
                    assert await end.set_memory() == 0
