"""A vhost-user front-end over a real socket: a guest's memory, its driver's queues, no guest."""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from avmm.mem.guest import GuestMemory
from avmm.mem.region import Region
from avmm.units import MIB, Gpa
from avmm.vhost_user.message import F_PROTOCOL_FEATURES, Request
from avmm.virtio import features
from fakes.driver_queue import DriverQueue, driver_queue
from fakes.mmio_driver import readable

MEMORY_BYTES = 4 * MIB
UVA = 0x7F00_0000_0000
"""Where the memory is in the front-end's address space; what matters is that it is elsewhere."""

ring: features.RingLayout = features.RING_DEFAULT
"""What a front-end makes of an offer of packed rings, when a test does not say."""

_QUEUES_GPA = 0x10000
_HANG_S = 20
_VERSION, _REPLY, _NEED_REPLY = 1, 1 << 2, 1 << 3


class FrontEnd:
    """Speaks the protocol by hand, so that a test may say any of it wrongly.

    It has the interface of a MmioDriver where the fakes of devices need one.
    """

    def __init__(self, connection: socket.socket, size_bytes: int = MEMORY_BYTES) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.memfd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.memfd, size_bytes)
        fcntl.fcntl(self.memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        region = Region(Gpa(0), size_bytes, mmap.mmap(self.memfd, size_bytes), 0)
        self.memory = GuestMemory((region,))
        self.driver = self
        self.queues: list[DriverQueue] = []
        self.kicks: list[int] = []
        self.calls: list[int] = []
        self.negotiated = 0

    def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        flags: int = _VERSION,
        size_bytes: int | None = None,
    ) -> None:
        size = len(payload) if size_bytes is None else size_bytes
        socket.send_fds(
            self.socket, [struct.pack("<III", request, flags, size) + payload], list(fds)
        )

    async def receive(self) -> tuple[int, bytes]:
        """(request, payload) of an answer; EOFError when the connection is closed instead."""
        request, flags, size = struct.unpack("<III", await self._exactly(12))
        assert flags & (_VERSION | _REPLY) == _VERSION | _REPLY
        return request, await self._exactly(size)

    async def ask(self, request: int, payload: bytes = b"") -> bytes:
        """The answer to a request that has one."""
        self.send(request, payload)
        answered, data = await self.receive()
        assert answered == request
        return data

    async def ask_with_fd(self, request: int, payload: bytes) -> tuple[bytes, list[int]]:
        """The answer to a request whose answer may bring a descriptor."""
        self.send(request, payload)
        await readable(self.socket.fileno())
        head, fds, _, _ = socket.recv_fds(self.socket, 12, 1)
        answered, _, size = struct.unpack("<III", head)
        assert answered == request
        return await self._exactly(size), fds

    async def ask_u64(self, request: int) -> int:
        return int.from_bytes(await self.ask(request), "little")

    async def do(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """A request by NEED_REPLY: 0 when it was done."""
        self.send(request, payload, fds, flags=_VERSION | _NEED_REPLY)
        answered, data = await self.receive()
        assert answered == request
        return int.from_bytes(data, "little")

    async def closed(self) -> bool:
        """Wait for the server to close the connection; False when it answers instead."""
        try:
            await self.receive()
        except (EOFError, ConnectionError):
            return True
        return False

    async def negotiate(self, accepted: int | None = None) -> None:
        """From the connection to the driver's features; all that are offered when None."""
        offered = await self.ask_u64(Request.GET_FEATURES)
        assert offered & F_PROTOCOL_FEATURES
        protocol = await self.ask_u64(Request.GET_PROTOCOL_FEATURES)
        self.send(Request.SET_PROTOCOL_FEATURES, u64(protocol))
        assert await self.do(Request.SET_OWNER) == 0
        if accepted is None:
            accepted = offered if ring == "packed" else offered & ~features.RING_PACKED
        self.negotiated = accepted | F_PROTOCOL_FEATURES
        assert await self.do(Request.SET_FEATURES, u64(self.negotiated)) == 0

    async def start(self, count: int = 1, *, size: int = 64, accepted: int | None = None) -> None:
        """From the connection to `count` running rings."""
        await self.negotiate(accepted)
        assert await self.set_memory() == 0
        await self.add_rings(count, size=size)

    async def add_rings(self, count: int, *, size: int) -> None:
        gpa = _QUEUES_GPA
        for index in range(count):
            queue = driver_queue(self.memory, gpa, size, self.negotiated)
            gpa = (queue.end_gpa + 0xFFF) & ~0xFFF
            self.queues.append(queue)
            self.calls.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            self.kicks.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            await self.start_ring(index)

    async def set_memory(self, *, gpa: int = 0, uva: int = UVA) -> int:
        region = (gpa, self.memory.size_bytes, uva, 0)
        return await self.do(Request.SET_MEM_TABLE, memory_table(region), [self.memfd])

    async def start_ring(self, index: int, base: int | None = None) -> None:
        """Set a ring up and let it run from `base` on; from where the queue is when None."""
        queue = self.queues[index]
        base = queue.base if base is None else base
        assert await self.do(Request.SET_VRING_NUM, state(index, queue.size)) == 0
        assert await self.do(Request.SET_VRING_BASE, state(index, base)) == 0
        assert await self.do(Request.SET_VRING_ADDR, self.addresses(index)) == 0
        assert await self.do(Request.SET_VRING_CALL, u64(index), [self.calls[index]]) == 0
        assert await self.do(Request.SET_VRING_KICK, u64(index), [self.kicks[index]]) == 0
        assert await self.do(Request.SET_VRING_ENABLE, state(index, 1)) == 0

    def addresses(self, index: int, uva: int = UVA) -> bytes:
        """The payload of SET_VRING_ADDR."""
        queue = self.queues[index]
        places = (queue.desc_gpa, queue.device_gpa, queue.driver_gpa)
        return struct.pack("<IIQQQQ", index, 0, *(uva + gpa for gpa in places), 0)

    async def stop_ring(self, index: int) -> int:
        """Stop a ring; where it stands."""
        answer = await self.ask(Request.GET_VRING_BASE, state(index, 0))
        answered, base = struct.unpack("<II", answer)
        assert answered == index
        return int(base)

    def kick(self, index: int) -> None:
        os.eventfd_write(self.kicks[index], 1)

    async def used(self, index: int, count: int = 1) -> list[tuple[int, int]]:
        """Wait until `count` chains of a queue came back: (head, bytes written) of each."""
        taken = self.queues[index].take_used()
        async with asyncio.timeout(_HANG_S):
            while len(taken) < count:
                await readable(self.calls[index])
                os.eventfd_read(self.calls[index])
                taken += self.queues[index].take_used()
        return taken

    def close(self) -> None:
        self.socket.close()
        self.memory.close()
        for fd in (self.memfd, *self.kicks, *self.calls):
            os.close(fd)

    async def _exactly(self, size: int) -> bytes:
        loop, data = asyncio.get_running_loop(), b""
        async with asyncio.timeout(_HANG_S):
            while len(data) < size:
                part = await loop.sock_recv(self.socket, size - len(data))
                if not part:
                    raise EOFError
                data += part
        return data


@asynccontextmanager
async def front_end(path: str) -> AsyncIterator[FrontEnd]:
    """One that is connected to `path`."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        await asyncio.get_running_loop().sock_connect(connection, path)
    except BaseException:
        connection.close()
        raise
    end = FrontEnd(connection)
    try:
        yield end
    finally:
        end.close()


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def state(index: int, value: int) -> bytes:
    return struct.pack("<II", index, value)


def memory_table(*regions: tuple[int, int, int, int]) -> bytes:
    """(gpa, size in bytes, address in the front-end, offset in the file) of each."""
    return struct.pack("<II", len(regions), 0) + b"".join(
        struct.pack("<QQQQ", *region) for region in regions
    )
