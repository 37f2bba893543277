"""virtio-vsock: streams between the guest and this process (virtio 1.3 section 5.10)."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Annotated, ClassVar, Final

import msgspec

from avmm.config import Checked
from avmm.errors import ConfigError, GuestFault
from avmm.native import lib
from avmm.virtio import features
from avmm.virtio.device import VirtioDevice
from avmm.virtio.devtype import DeviceContext, DeviceType
from avmm.virtio.home import HomeChoice
from avmm.vsock.host import VsockHost
from avmm.vsock.packet import CID_MAX, CID_MIN
from avmm.vsock.reasons import Reason
from avmm.vsock.splice import Splice
from avmm.vsock.table import Sent, Table

RX, TX, EVENT = range(3)
_QUEUE_SIZE: Final = 256
_EVENT_QUEUE_SIZE: Final = 16


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
    home: HomeChoice = "auto"
    id: Annotated[str | None, _meta("name in logs and statistics")] = None

    device_type: ClassVar[DeviceType]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not CID_MIN <= self.cid <= CID_MAX:
            raise ConfigError("cid", f"vsock: cid {self.cid} is not in {CID_MIN} to {CID_MAX}")


class VsockDevice(VirtioDevice):
    """Packets of connections with Python go between `host` and the rings; those with unix sockets
    are the lane's alone."""

    def __init__(self, config: Vsock, context: DeviceContext) -> None:
        sizes = (_QUEUE_SIZE, _QUEUE_SIZE, _EVENT_QUEUE_SIZE)
        super().__init__(VSOCK, context, offered=features.IN_ORDER, queue_sizes=sizes)
        self.set_config(struct.pack("<Q", config.cid))
        home = context.homes.pick(config.home)
        on_loop = home is context.homes.loop
        self.splice = Splice(context.loop, self._broken)
        self.splice.open(
            home.native,
            self.queues[RX].ring,
            self.queues[TX].ring,
            cid=config.cid,
            path=config.uds,
            announces=not on_loop,
        )
        context.stack.callback(self.splice.close)
        self.add_lane(self.splice.lane, home, self.queues[:EVENT], "vsock")
        if on_loop:
            context.stack.callback(home.after_turn(self._after_turn))
        self.table = Table(config.cid, context.loop, self._on_work, self.splice)
        self.host = VsockHost(self.table, context.loop, context.guest_log, self.splice.serve)
        context.stack.push_async_callback(self.host.close)
        self._working = False
        self._due: asyncio.Handle | None = None
        self._starved = self._held_back = False

    def on_resume(self) -> None:
        """Send what waited."""
        self._working = True
        self._starved = False
        self.table.resume()
        self._on_work()

    def on_hold(self) -> None:
        """Take and give nothing."""
        self._working = False
        self.table.hold()
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def on_reset(self) -> None:
        """The driver knows of no connection any more."""
        self._forget(Reason.DRIVER_RESET)

    def fault(self, fault: GuestFault) -> None:
        """Nothing moves until the driver has begun anew, so all streams end."""
        super().fault(fault)
        self._forget(Reason.DEVICE_BROKEN)

    def is_kicked(self, index: int) -> bool:
        """Events would come by the third queue; there are none."""
        return False

    def on_news(self) -> None:
        """The lane left something to Python."""
        if not self._working:
            return  # it keeps
        news = self.splice.take_news()
        if news & lib.AV_VSOCK_INBOX:
            self._receive()
        if news & lib.AV_VSOCK_ROOM:
            self._send()  # even with nothing to send: the lane waits until this has had its turn

    def counters(self) -> dict[str, int]:
        """Of packets, bytes and connections."""
        counters, spliced = self.table.counters, self.splice.statistics()
        return {
            "connections": spliced.connections,
            "opened": counters.opened + spliced.opened,
            "refused": counters.refused + spliced.refused,
            "strayed": counters.strayed,
            "resets": counters.resets,
            "rx_packets": counters.rx_packets + spliced.rx_packets,
            "rx_bytes": counters.rx_bytes + spliced.rx_bytes,
            "tx_bytes": spliced.tx_bytes,
        }

    def _after_turn(self) -> None:
        if self.splice.has_news:
            self._tell_news()

    def _broken(self) -> GuestFault:
        queue = self.queues[RX]
        return GuestFault(queue.fault, f"Queue {RX}: {queue.fault}")

    def _forget(self, reason: Reason) -> None:
        self._starved = self._held_back = False
        self.table.reset(reason)
        self.splice.reset(reason)

    def _receive(self) -> None:
        """Packets of the guest's, when their answers can be kept: each may need one."""
        table = self.table
        # It is heard again when it takes those there are (5.10.6.1).
        self._held_back = not table.has_room_for_replies
        if not self._held_back:
            table.receive(*self.splice.receive())

    def _on_work(self) -> None:
        """There is something to send: in a turn of its own, so that it goes together."""
        if self._working and self._due is None and not self._starved:
            self._due = self.context.loop.call_soon(self._send_soon)

    def _send_soon(self) -> None:
        self._due = None
        if self._working:
            with self._contained():
                self.on_news()
                self._send()

    def _send(self) -> None:
        """Put what is due into the guest's buffers."""
        table = self.table
        sent = table.send(self.splice)
        self._starved = sent is Sent.NO_ROOM
        self.splice.flush()
        if sent is Sent.MORE:
            self._on_work()
        if self._held_back:
            self._receive()


async def build(config: Vsock, context: DeviceContext) -> VsockDevice:
    """The device, and the unix socket if there is to be one."""
    device = VsockDevice(config, context)
    if config.uds is not None:
        from avmm.vsock.uds import UnixSocket  # most have none

        def ask(program: socket.socket, port: int) -> None:
            device.splice.ask(program.detach(), port)

        programs = UnixSocket(config.uds, ask, context.guest_log, context.loop)
        context.stack.callback(programs.close)
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
