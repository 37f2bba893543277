"""virtio-vsock: streams between the guest and this process (virtio 1.3 section 5.10)."""

from __future__ import annotations

import asyncio
import struct
from typing import Annotated, ClassVar, Final

import msgspec

from avmm.config import Checked
from avmm.errors import ConfigError, GuestFault
from avmm.native import ffi, lib
from avmm.virtio import features
from avmm.virtio.device import VirtioDevice
from avmm.virtio.devtype import DeviceContext, DeviceType
from avmm.virtio.home import HomeChoice
from avmm.virtio.queue import Queue
from avmm.vsock.credit import BUFFER_BYTES
from avmm.vsock.host import VsockHost
from avmm.vsock.packet import CID_MAX, CID_MIN, HEADER_BYTES, Header, parse
from avmm.vsock.table import Sent

RX, TX, EVENT = range(3)
_QUEUE_SIZE: Final = 256
_EVENT_QUEUE_SIZE: Final = 16
_PACKETS_MAX: Final = 64
"""Taken from the guest at a time."""


def _meta(description: str) -> msgspec.Meta:
    return msgspec.Meta(description=description)


class Vsock(Checked, frozen=True):
    """Sockets between programs of the guest and of the host."""

    cid: Annotated[int, _meta("the guest's address, 3 or more; other microVMs may have it too")] = 3
    uds: Annotated[
        str | None,
        _meta(
            "unix socket for programs of the host: CONNECT PORT leads to a port of the guest's, "
            "and port P of the host's is the socket UDS_P"
        ),
    ] = None
    id: Annotated[str | None, _meta("name in logs and statistics")] = None

    device_type: ClassVar[DeviceType]
    home: ClassVar[HomeChoice] = "loop"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not CID_MIN <= self.cid <= CID_MAX:
            raise ConfigError("cid", f"vsock: cid {self.cid} is not in {CID_MIN} to {CID_MAX}")


class _GuestRing:
    """The receive queue, as what is to be sent sees it."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self.packets = self.bytes = 0

    def put(self, header: Header, data: memoryview) -> int:
        """See Ring. Raises GuestFault."""
        with ffi.from_buffer("uint8_t[]", data) as native:
            put = int(lib.av_vsock_put(self._queue.ring, header.pack(), native, len(data)))
        self._check(put)
        self.bytes += put
        return put

    def put_header(self, header: Header) -> bool:
        """See Ring. Raises GuestFault."""
        put = int(lib.av_vsock_put_header(self._queue.ring, header.pack()))
        self._check(put)
        self.packets += put
        return bool(put)

    def _check(self, result: int) -> None:
        if result < 0:
            raise GuestFault(self._queue.fault, f"Queue {RX}: {self._queue.fault}")


class VsockDevice(VirtioDevice):
    """Moves packets between the rings and `host`, where connections are. Served on the loop."""

    def __init__(self, config: Vsock, context: DeviceContext) -> None:
        sizes = (_QUEUE_SIZE, _QUEUE_SIZE, _EVENT_QUEUE_SIZE)
        super().__init__(VSOCK, context, offered=features.IN_ORDER, queue_sizes=sizes)
        self.set_config(struct.pack("<Q", config.cid))
        self.host = VsockHost(config.cid, context.loop, self._on_work, context.guest_log)
        context.stack.push_async_callback(self.host.close)
        self._ring = _GuestRing(self.queues[RX])
        self._headers = bytearray(_PACKETS_MAX * HEADER_BYTES)
        self._data = bytearray(BUFFER_BYTES)
        self._native_headers = ffi.from_buffer("uint8_t[]", self._headers)
        self._native_data = ffi.from_buffer("uint8_t[]", self._data)
        self._working = False
        self._due: asyncio.Handle | None = None
        self._starved = self._held_back = False

    def on_resume(self) -> None:
        """Send what waited."""
        self._working = True
        self._on_work()

    def on_hold(self) -> None:
        """Take and give nothing."""
        self._working = False
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def on_reset(self) -> None:
        """The driver knows of no connection any more."""
        self._starved = self._held_back = False
        self.host.table.reset("The guest's vsock driver was reset")

    def fault(self, fault: GuestFault) -> None:
        """Nothing moves until the driver has begun anew, so all streams end."""
        super().fault(fault)
        self.host.table.reset(f"The guest broke its vsock device: {fault}")

    def is_kicked(self, index: int) -> bool:
        """Events would come by the third queue; there are none."""
        return index != EVENT

    def kick(self, index: int) -> bool:
        """The guest has sent packets, or made room for ours."""
        queue = self.queues[index]
        queue.take_kick()
        lib.av_vring_count_kick(queue.ring)
        if index == TX:
            return self._take()
        if self._starved:
            self._send()
        return False

    def counters(self) -> dict[str, int]:
        """Of packets, bytes and connections."""
        table = self.host.table
        counters = table.counters
        return {
            "connections": len(table),
            "opened": counters.opened,
            "refused": counters.refused,
            "strayed": counters.strayed,
            "resets": counters.resets,
            "rx_packets": counters.rx_packets,
            "rx_bytes": counters.rx_bytes,
            "tx_bytes": self._ring.bytes,
        }

    def _take(self) -> bool:
        """Take packets of the guest's, and answer; whether there may be more."""
        queue = self.queues[TX]
        lib.av_vring_kicks_off(queue.ring)
        while self.host.table.has_room_for_replies:
            count = lib.av_vsock_take(
                queue.ring, self._native_headers, _PACKETS_MAX, self._native_data, BUFFER_BYTES
            )
            if count < 0:
                raise GuestFault(queue.fault, f"Queue {TX}: {queue.fault}")
            if count == 0:
                if lib.av_vring_kicks_on(queue.ring):
                    continue
                return False
            lib.av_vring_flush(queue.ring)
            headers = list(parse(memoryview(self._headers)[: count * HEADER_BYTES]))
            size = sum(header.size_bytes for header in headers)
            self.host.table.receive(headers, memoryview(self._data)[:size])
            return True
        # It takes no answers: it is heard again when it does (5.10.6.1).
        self._held_back = True
        return False

    def _on_work(self) -> None:
        """There is something to send: in a turn of its own, so that it goes together."""
        if self._working and self._due is None and not self._starved:
            self._due = self.context.loop.call_soon(self._send_soon)

    def _send_soon(self) -> None:
        self._due = None
        if self._working:
            with self._contained():
                self._send()

    def _send(self) -> None:
        """Put what is due into the guest's buffers."""
        table, ring = self.host.table, self.queues[RX].ring
        self._starved = False
        lib.av_vring_kicks_off(ring)
        sent = table.send(self._ring)
        lib.av_vring_flush(ring)
        if sent is Sent.NO_ROOM:
            self._starved = not lib.av_vring_kicks_on(ring)
        if sent is not Sent.ALL and not self._starved:
            self._on_work()
        if self._held_back and table.has_room_for_replies:
            self._held_back = False
            self.queues[TX].notify()


async def build(config: Vsock, context: DeviceContext) -> VsockDevice:
    """The device, and the unix socket if there is to be one."""
    device = VsockDevice(config, context)
    if config.uds is not None:
        from avmm.vsock.uds import UnixSockets  # most have none

        sockets = UnixSockets(config.uds, device.host, context.loop)
        context.stack.push_async_callback(sockets.close)
    return device


VSOCK = DeviceType(
    name="vsock",
    virtio_id=19,
    flag="--vsock",
    summary="sockets between programs of the guest and of the host: asyncio streams, unix sockets",
    build=build,
    pci_class=0x07_8000,
)
Vsock.device_type = VSOCK
