"""A guest with a vsock device, and packets that it sends and receives as it likes."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from avmm.virtio.devices.vsock import RX, TX, Vsock, VsockDevice, build
from avmm.vsock.host import VsockHost
from avmm.vsock.packet import CID_HOST, HEADER_BYTES, TYPE_STREAM, Header, Op, parse
from fakes.apart_vsock import Apart, apart, apart_rig
from fakes.driver_queue import Segment
from fakes.virtio_rig import DATA_GPA

CID = 3
GUEST_BUFFER_BYTES = 256 * 1024
BETWEEN_BYTES = 512 * 1024
_TX_GPA = DATA_GPA + 0x10_0000
_TX_ROOM = 0x1_1000
_TX_SLOTS = 16

Packet = tuple[Header, bytes]


@dataclass
class VsockGuest:
    """buf_alloc: what every packet says, and `fwd_cnt` what it says of its connection's port.
    sent: packets. apart: where the host is, when it is not with the device."""

    rig: Any
    buffers: int = 32
    buffer_bytes: int = 4096
    buf_alloc: int = GUEST_BUFFER_BYTES
    fwd_cnt: dict[int, int] = field(default_factory=dict)
    sent: int = 0
    apart: Apart | None = None
    _buffers: dict[int, int] = field(default_factory=dict)
    _arrived: deque[Packet] = field(default_factory=deque)
    _slots: list[int] = field(default_factory=lambda: list(range(_TX_SLOTS)))
    _sending: dict[int, int] = field(default_factory=dict)

    @property
    def host(self) -> VsockHost:
        host: VsockHost = self.rig.device.host
        return host if self.apart is None else self.apart.sockets.host

    @property
    def between_bytes(self) -> int:
        """What there may be between the host and the device."""
        return 0 if self.apart is None else BETWEEN_BYTES

    def counter(self, name: str) -> int:
        value: int = self.rig.device.statistics().counters[name]
        return value

    def offer(self, count: int) -> None:
        """Buffers for packets; each comes back into the ring when its packet was taken."""
        first = len(self._buffers)
        for index in range(first, first + count):
            self._offer(DATA_GPA + index * self.buffer_bytes)
        self.rig.driver.kick(RX)

    def _offer(self, gpa: int) -> None:
        head = self.rig.driver.queues[RX].offer(Segment(gpa, self.buffer_bytes, writable=True))
        self._buffers[head] = gpa

    def send(
        self,
        op: int,
        host_port: int,
        guest_port: int,
        payload: bytes = b"",
        cuts: tuple[int, ...] = (),
        **fields: int,
    ) -> None:
        """A packet to the host. fields: of its header, where they are to be other ones."""
        header = Header(
            CID,
            CID_HOST,
            guest_port,
            host_port,
            len(payload),
            TYPE_STREAM,
            op,
            0,
            self.buf_alloc,
            self.fwd_cnt.get(host_port, 0) & 0xFFFF_FFFF,
        )._replace(**fields)
        self.send_bytes(header.pack() + payload, cuts=cuts)

    def send_bytes(self, data: bytes, *, cuts: tuple[int, ...] = ()) -> None:
        """Whatever is to be a packet, in segments that end at `cuts`."""
        queue = self.rig.driver.queues[TX]
        assert self.free_slots, "the device takes nothing"
        slot = self._slots.pop(0)
        gpa = _TX_GPA + slot * _TX_ROOM
        self.rig.memory.write(gpa, data)
        ends = [*cuts, len(data)]
        starts = [0, *cuts]
        head = queue.offer(*(Segment(gpa + a, b - a) for a, b in zip(starts, ends, strict=True)))
        self._sending[head] = slot
        self.sent += 1
        self.rig.driver.kick(TX)

    @property
    def free_slots(self) -> int:
        """How many packets can be sent before the device has taken one."""
        for head, _ in self.rig.driver.queues[TX].take_used():
            self._slots.append(self._sending.pop(head))
        return len(self._slots)

    @property
    def unheard(self) -> int:
        """How many packets the device has not taken."""
        return _TX_SLOTS - self.free_slots

    def has_packet(self) -> bool:
        """Whether packet() has one at once."""
        self._take(self.rig.driver.queues[RX].take_used())
        return bool(self._arrived)

    async def packet(self) -> Packet:
        """The next packet of the host's."""
        while not self._arrived:
            self._take(await self.rig.driver.used(RX))
        return self._arrived.popleft()

    def _take(self, used: list[tuple[int, int]]) -> None:
        for head, written in used:
            gpa = self._buffers.pop(head)
            data = self.rig.memory.read(gpa, written)
            (header,) = parse(data[:HEADER_BYTES])
            assert len(data) == HEADER_BYTES + header.size_bytes
            self._arrived.append((header, data[HEADER_BYTES:]))
            self._offer(gpa)
        if used:
            self.rig.driver.kick(RX)

    async def restart(self) -> None:
        """The driver begins anew."""
        buffers = len(self._buffers) or self.buffers
        self._buffers, self._sending = {}, {}
        self._slots = list(range(_TX_SLOTS))
        self._arrived.clear()
        self.fwd_cnt.clear()
        await self.rig.driver.start()
        self.offer(buffers)

    async def expect(self, op: Op) -> Packet:
        """The next packet, which is of that kind."""
        header, payload = await self.packet()
        assert header.op == op, f"{Op(header.op).name}, not {op.name}"
        assert (header.src_cid, header.dst_cid) == (CID_HOST, CID)
        return header, payload

    async def accept(self) -> tuple[int, int]:
        """Say yes to the host's next request; its port and ours."""
        header, _ = await self.expect(Op.REQUEST)
        self.send(Op.RESPONSE, header.src_port, header.dst_port)
        return header.src_port, header.dst_port

    async def receive(self, count: int) -> bytes:
        """Bytes of the one connection there is; taken, and said to be."""
        data = b""
        while len(data) < count:
            header, payload = await self.expect(Op.RW)
            data += payload
            port = header.src_port
            self.fwd_cnt[port] = self.fwd_cnt.get(port, 0) + len(payload)
        self.send(Op.CREDIT_UPDATE, header.src_port, header.dst_port)
        assert len(data) == count
        return data


Rigged = Callable[..., AbstractAsyncContextManager[Any]]


@asynccontextmanager
async def vsock_guest(
    rigged: Rigged,
    *,
    buffers: int = 32,
    buffer_bytes: int = 4096,
    start: bool = True,
    **options: Any,
) -> AsyncIterator[VsockGuest]:
    """A started one. rigged: virtio_rig or pci_rig; options: of Vsock."""

    async def make(context: Any) -> VsockDevice:
        return await build(Vsock(CID, **options), context)

    async with AsyncExitStack() as stack:
        here = rigged is not apart_rig
        uds = options.pop("uds", None) if not here else None
        rig = await stack.enter_async_context(rigged(make))
        guest = VsockGuest(rig, buffers, buffer_bytes)
        if not here:
            config = Vsock(CID, uds)
            guest.apart = await stack.enter_async_context(apart(rig.device, config))
        if start:
            await guest.restart()
        yield guest
        assert rig.errors == []
