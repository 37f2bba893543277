"""A server that dies with requests in flight, and the next one: nothing is lost."""

from __future__ import annotations

import copy
import os
import struct
from pathlib import Path

import pytest

import fakes.front_end
from avmm.vhost_user.message import Request
from avmm.vhost_user.server import VhostUserServer
from avmm.virtio.devices.blk import Disk
from fakes.blk_driver import OK, OUT, BlkDriver
from fakes.front_end import FrontEnd, front_end
from fakes.mmio_driver import eventually
from fakes.pipe_disk import Stuck

SIZE = 64


@pytest.fixture(autouse=True)
def _split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fakes.front_end, "ring", "split")


def asked(queues: int = 1, size: int = SIZE) -> bytes:
    return struct.pack("<QQHH4x", 0, 0, queues, size)


async def keep(end: FrontEnd) -> tuple[bytes, int]:
    """What the server gives us to keep: where it is in a file, and the file."""
    where, [fd] = await end.ask_with_fd(Request.GET_INFLIGHT_FD, asked())
    assert await end.do(Request.SET_INFLIGHT_FD, where, [fd]) == 0
    return where, fd


def contents(path: Path) -> bytes:
    return path.read_bytes()


async def test_the_next_server_does_what_was_in_flight(
    stuck: Stuck, image: Path, tmp_path: Path
) -> None:
    """What two processes share, as it is at one moment, is what the next server finds."""
    async with front_end(stuck.server.socket_path) as end:
        await end.negotiate()
        assert await end.set_memory() == 0
        where, kept = await keep(end)
        await end.add_rings(1, size=SIZE)
        blk = BlkDriver(end)
        slots = [blk.submit(OUT, 8 * at, bytes([at]) * 4096) for at in range(3)]
        blk.kick()
        await eventually(lambda: stuck.server.statistics().device.queues[0].chains == 3)
        memory, queue = end.memory.read(0, end.memory.size_bytes), end.queues[0]
        flight = os.memfd_create("flight", os.MFD_CLOEXEC)
        os.write(flight, os.pread(kept, os.fstat(kept).st_size, 0))
        os.close(kept)
        stuck.drain()
    async with (
        VhostUserServer(Disk(str(image)), f"{tmp_path}/next") as server,
        front_end(server.socket_path) as end,
    ):
        await end.negotiate()
        assert await end.set_memory() == 0
        assert await end.do(Request.SET_INFLIGHT_FD, where, [flight]) == 0
        os.close(flight)
        end.memory.write(0, memory)
        end.queues = [copy.copy(queue)]
        end.queues[0].memory = end.memory
        end.kicks, end.calls = ([os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)] for _ in "kc")
        await end.start_ring(0, base=0)
        await end.used(0, 3)
        blk = BlkDriver(end)
        assert [blk.status(slot) for slot in slots] == [OK] * 3
        assert (await blk.request(OUT, 100, b"after" * 102 + b".."))[0] == OK
    assert contents(image)[: 3 * 4096] == b"".join(bytes([at]) * 4096 for at in range(3))


async def test_memory_that_is_kept_is_sealed(server: VhostUserServer) -> None:
    async with front_end(server.socket_path) as end:
        await end.negotiate()
        _, fd = await keep(end)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        os.close(fd)


async def test_packed_rings_keep_nothing(
    server: VhostUserServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fakes.front_end, "ring", "packed")
    async with front_end(server.socket_path) as end:
        await end.negotiate()
        where, fds = await end.ask_with_fd(Request.GET_INFLIGHT_FD, asked())
        assert (where, fds) == (asked(), [])


@pytest.mark.parametrize("flaw", ["too many rings", "too small", "cut short", "no file"])
async def test_memory_that_cannot_be_is_refused(server: VhostUserServer, flaw: str) -> None:
    fd = os.memfd_create("flight", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4096)
    where = struct.pack("<QQHH4x", 4096, 0, 1, SIZE)
    async with front_end(server.socket_path) as end:
        await end.negotiate()
        if flaw == "too many rings":
            end.send(Request.GET_INFLIGHT_FD, asked(queues=100))
        else:
            if flaw == "too small":
                where = struct.pack("<QQHH4x", 64, 0, 1, SIZE)
            elif flaw == "cut short":
                where = struct.pack("<QQHH4x", 4096, 64, 1, SIZE)
            else:
                os.close(fd)
                fd = os.eventfd(0, os.EFD_CLOEXEC)
            end.send(Request.SET_INFLIGHT_FD, where, [fd])
        assert await end.closed()
    os.close(fd)


async def test_a_ring_larger_than_its_memory_is_refused(server: VhostUserServer) -> None:
    async with front_end(server.socket_path) as end:
        await end.negotiate()
        assert await end.set_memory() == 0
        _, fd = await keep(end)
        os.close(fd)
        with pytest.raises(AssertionError):
            await end.add_rings(1, size=2 * SIZE)
