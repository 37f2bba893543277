"""A NIC over real rings, a socket pair in the place of each of the TAP's queues."""

from __future__ import annotations

import functools
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from avmm.hostnet.tap import HostTap, TapSettings
from avmm.virtio.devices.net import RX, TX, NetDevice, Tap
from avmm.virtio.devices.nic import Nic
from avmm.virtio.devices.nic import build as build_nic
from avmm.virtio.devtype import DeviceContext
from fakes.driver_queue import DriverQueue, Segment
from fakes.mmio_driver import readable
from fakes.virtio_rig import DATA_GPA, Rig, virtio_rig

HEADER = bytes(12)
RX_GPA = DATA_GPA
TX_GPA = DATA_GPA + 0x10_0000
CONTROL_GPA = DATA_GPA + 0x20_0000
PENDING = 0xFF
"""What stands in the place of an answer that has not come."""


class FakeTap(HostTap):
    """Packets go to and come from `wires`, each with the 12 bytes of a header.

    offloads, carrier, queues: what was asked for, in this order.
    """

    def __init__(self, pairs: int = 1, *, uso: bool = False) -> None:
        self.wires: list[socket.socket] = []
        fds: list[int] = []
        for _ in range(pairs):
            ours, wire = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            for end in (ours, wire):
                end.setblocking(False)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # as small as it gets
            self.wires.append(wire)
            fds.append(ours.detach())
        settings = TapSettings("avtest0")
        super().__init__(settings, fds, created=True, added=False, mtu=1500, uso=uso)
        self.offloads: list[int] = []
        self.carrier: list[bool] = []
        self.queues: list[list[bool]] = []

    @property
    def wire(self) -> socket.socket:
        return self.wires[0]

    def set_offload(self, flags: int) -> None:
        self.offloads.append(flags)

    def set_carrier(self, up: bool) -> None:
        self.carrier.append(up)

    def set_queues(self, attached: Sequence[bool]) -> None:
        self.queues.append(list(attached))

    async def sent(self, pair: int = 0) -> bytes:
        """The next packet that the guest sent, without its header."""
        await readable(self.wires[pair].fileno())
        return self.wires[pair].recv(70_000)[12:]


@dataclass
class NicRig:
    """A started device of a Nic, and its driver's receive buffers."""

    rig: Rig[NetDevice]
    buffers: dict[int, int] = field(default_factory=dict)

    def offer_rx(self, count: int, size_bytes: int = 2048) -> None:
        for at in range(count):
            gpa = RX_GPA + at * size_bytes
            head = self.rig.driver.queues[RX].offer(Segment(gpa, size_bytes, writable=True))
            self.buffers[head] = gpa
        self.rig.driver.kick(RX)

    def send(self, *frames: bytes, header: bytes = HEADER) -> None:
        gpa = TX_GPA
        for frame in frames:
            self.rig.memory.write(gpa, header + frame)
            self.rig.driver.queues[TX].offer(Segment(gpa, len(header) + len(frame)))
            gpa += (len(header) + len(frame) + 7) & ~7
        self.rig.driver.kick(TX)

    async def received(self, count: int = 1) -> list[bytes]:
        """Headers and frames, each of which fits in one buffer."""
        used = await self.rig.driver.used(RX, count)
        return [self.rig.memory.read(self.buffers[head], written) for head, written in used]


@asynccontextmanager
async def nic_rig(
    nic: Nic,
    io_threads: int = 0,
    accept: int | None = None,
    *,
    size: int = 64,
    start: bool = True,
    rigged: Callable[..., Any] = virtio_rig,
) -> AsyncIterator[NicRig]:
    """accept, size: as VirtioDriver.start()."""
    async with rigged(functools.partial(build_nic, nic), io_threads=io_threads) as rig:
        if start:
            await rig.driver.start(accept, size=size)
        yield NicRig(rig)
        assert rig.errors == []


@dataclass
class Net:
    """buffers: where each head's receive buffer is, of each pair. arrived: those that came back
    and were not looked at."""

    rig: Rig[NetDevice]
    tap: FakeTap
    buffers: dict[tuple[int, int], int] = field(default_factory=dict)
    arrived: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    @property
    def rx(self) -> DriverQueue:
        return self.rig.driver.queues[RX]

    def offer_rx(self, count: int, size_bytes: int = 2048, *, pair: int = 0) -> None:
        for at in range(count):
            gpa = RX_GPA + at * size_bytes + pair * 0x2_0000
            head = self.rig.driver.queues[2 * pair].offer(Segment(gpa, size_bytes, writable=True))
            self.buffers[pair, head] = gpa
        self.rig.driver.kick(2 * pair)

    def send(self, frame: bytes, at: int = 0, *, pair: int = 0) -> None:
        gpa = TX_GPA + 2048 * at + pair * 0x2_0000
        self.rig.memory.write(gpa, HEADER + frame)
        self.rig.driver.queues[2 * pair + TX].offer(Segment(gpa, len(HEADER) + len(frame)))
        self.rig.driver.kick(2 * pair + TX)

    def counter(self, name: str) -> int:
        return self.rig.device.statistics().counters[name]

    async def received(self, pair: int = 0) -> bytes:
        """The next frame, which fits in one buffer."""
        packet = await self.packet(pair)
        assert packet[10:12] == b"\x01\x00"  # num_buffers
        return packet[12:]

    async def packet(self, pair: int = 0) -> bytes:
        """The next header and frame, from as many buffers as they are spread over."""
        arrived = self.arrived.setdefault(pair, [])
        if not arrived:
            arrived += await self.rig.driver.used(2 * pair)
        head, written = arrived.pop(0)
        packet = self.rig.memory.read(self.buffers[pair, head], written)
        for _ in range(int.from_bytes(packet[10:12], "little") - 1):
            if not arrived:
                arrived += await self.rig.driver.used(2 * pair)
            head, written = arrived.pop(0)
            packet += self.rig.memory.read(self.buffers[pair, head], written)
        return packet

    async def control(self, command: bytes, *, queue: int = -1) -> int:
        """Put a command on the control queue; its ack."""
        index = queue % len(self.rig.driver.queues)
        ack_gpa = CONTROL_GPA + len(command)
        self.rig.memory.write(CONTROL_GPA, command + bytes([PENDING]))
        self.rig.driver.queues[index].offer(
            *([Segment(CONTROL_GPA, len(command))] if command else []),
            Segment(ack_gpa, 1, writable=True),
        )
        self.rig.driver.kick(index)
        ((_, written),) = await self.rig.driver.used(index)
        assert written == 1
        return self.rig.memory.read(ack_gpa, 1)[0]


Plugged = Callable[..., AbstractAsyncContextManager[Net]]


@asynccontextmanager
async def net_rig(
    io_threads: int,
    accept: int | None = None,
    *,
    pairs: int = 1,
    uso: bool = False,
    size: int = 64,
    tap: FakeTap | None = None,
    rigged: Callable[..., Any] = virtio_rig,
    **options: object,
) -> AsyncIterator[Net]:
    """A started NIC. accept, size: as VirtioDriver.start(); tap: in the place of one with `pairs`
    and `uso`; options: further fields of Tap."""
    tap = tap or FakeTap(pairs, uso=uso)

    async def build(context: DeviceContext) -> NetDevice:
        for wire in tap.wires:
            context.stack.callback(wire.close)
        context.stack.push_async_callback(tap.close)
        return NetDevice(Tap("avtest0", **options), tap, context)  # type: ignore[arg-type]

    async with rigged(build, io_threads=io_threads) as rig:
        await rig.driver.start(accept, size=size)
        yield Net(rig, tap)
        assert rig.errors == []
