"""virtio-console with ports: named byte streams (virtio 1.3 section 5.3, MULTIPORT)."""

from __future__ import annotations

import logging
import re
from typing import Annotated, ClassVar

import msgspec

from avmm.config import Checked
from avmm.errors import ConfigError, GuestFault
from avmm.virtio import features
from avmm.virtio.byte_queue import ByteQueue
from avmm.virtio.chain import ChainQueue
from avmm.virtio.device import VirtioDevice
from avmm.virtio.devices.console import CONFIG, PCI_CLASS, QUEUE_SIZE, VIRTIO_ID, last_bytes
from avmm.virtio.devices.port import GuestPort
from avmm.virtio.devices.ports_control import Event, pack, parse
from avmm.virtio.devtype import DeviceContext, DeviceType

PORTS_MAX = 30
CONTROL_RX, CONTROL_TX = 2, 3
_CONTROL_DATA_MAX_BYTES = 4096
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}")


class Ports(Checked, frozen=True):
    """Byte streams to programs in the guest, which see them as /dev/virtio-ports/NAME."""

    names: Annotated[
        list[str], msgspec.Meta(description=f"names of 1 to {PORTS_MAX} ports, with : between")
    ]
    id: Annotated[str | None, msgspec.Meta(description="name in logs and statistics")] = None

    device_type: ClassVar[DeviceType]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= len(self.names) <= PORTS_MAX:
            raise ConfigError("ports", f"ports: {len(self.names)} names, not 1 to {PORTS_MAX}")
        for name in self.names:
            if not _NAME.fullmatch(name):
                raise ConfigError(
                    "ports",
                    f"ports: {name!r} is no name: 1 to 63 letters, digits, dots, dashes and "
                    "underscores, of which dot and dash are not first",
                )
            if self.names.count(name) > 1:
                raise ConfigError("ports", f"ports: {name!r} is given more than once")


class PortsDevice(VirtioDevice):
    """The ports, numbered from 1 on: number 0 is what a driver without MULTIPORT would take for a
    console."""

    def __init__(self, config: Ports, context: DeviceContext) -> None:
        pairs = 1 + len(config.names)
        super().__init__(
            PORTS,
            context,
            offered=features.CONSOLE_MULTIPORT,
            queue_sizes=(QUEUE_SIZE,) * (2 * pairs + 2),
        )
        self._working = False
        self._messages = 0
        self._errors = 0
        # What the driver is to be told, in order. A message is made when it is sent, of how things
        # are then, so a driver that takes none makes none pile up.
        self._pending: dict[tuple[int, Event], None] = {}
        self._to_driver = ByteQueue(self.queues[CONTROL_RX], context)
        self._from_driver = ChainQueue(
            self.queues[CONTROL_TX], data_max_bytes=_CONTROL_DATA_MAX_BYTES
        )
        self.ports = {
            name: self._make_port(id, name) for id, name in enumerate(config.names, start=1)
        }
        self._by_id = {port.id: port for port in self.ports.values()}
        self.set_config(CONFIG.pack(0, 0, pairs, 0))
        context.stack.callback(self._end)

    def is_kicked(self, index: int) -> bool:
        """Port 0 is not there."""
        return index >= CONTROL_RX

    def on_resume(self) -> None:
        """What came while the device was at rest."""
        self._working = True
        self._tell()
        for port in self._by_id.values():
            port.feed()

    def on_hold(self) -> None:
        """The queues are not touched any more."""
        self._working = False

    def on_queue_stop(self, index: int) -> None:
        """What was begun is the driver's again."""
        if index == CONTROL_RX:
            self._to_driver.forget()
        elif index > CONTROL_TX:
            port = self._by_id[index // 2 - 1]
            (port.tx if index & 1 else port.rx).forget()

    def on_reset(self) -> None:
        """The driver knows of no port any more."""
        self._pending.clear()
        for port in self._by_id.values():
            port.reset()

    def kick(self, index: int) -> bool:
        """The driver said something, wrote, or has more buffers to be filled."""
        if index == CONTROL_RX:
            self._to_driver.take_kick()
            self._tell()
        elif index == CONTROL_TX:
            for chain in self._from_driver.take():
                self._hear(chain.data)
                self._from_driver.answer(chain, b"")
        else:
            port = self._by_id[index // 2 - 1]
            if index & 1:
                port.tx.take_kick()
                return port.serve()
            port.rx.take_kick()
            port.feed()
        return False

    def counters(self) -> dict[str, int]:
        """Bytes on all ports, messages of the driver, and those that meant nothing."""
        ports = [port.statistics() for port in self._by_id.values()]
        return {
            "tx_bytes": sum(port.tx_bytes for port in ports),
            "rx_bytes": sum(port.rx_bytes for port in ports),
            "control_messages": self._messages,
            "control_errors": self._errors,
        }

    def _make_port(self, id: int, name: str) -> GuestPort:
        rx, tx = self.queues[2 * id + 2 : 2 * id + 4]
        return GuestPort(
            id,
            name,
            ByteQueue(rx, self.context),
            ByteQueue(tx, self.context),
            on_open=self._on_open,
            put=self._put,
            is_working=lambda: self._working,
        )

    def _hear(self, data: bytes | None) -> None:
        """A message of the driver (5.3.6.2); what means nothing is counted."""
        self._messages += 1
        message = parse(data or b"")
        if message is not None and message.event is Event.DEVICE_READY:
            self._on_driver_ready(bool(message.value))
            return
        port = self._by_id.get(message.id) if message is not None else None
        if message is None or port is None or not port.added:
            self._errors += 1
        elif message.event is Event.PORT_OPEN:
            port.set_guest_open(bool(message.value))
        elif message.value:
            port.ready = True
            self._pending[port.id, Event.PORT_NAME] = None
            if port.host_open:
                self._pending[port.id, Event.PORT_OPEN] = None
            self._tell()
        else:
            self.say(logging.WARNING, "the driver cannot use port %s", port.name)

    def _on_driver_ready(self, ready: bool) -> None:
        if not ready:
            self.say(logging.WARNING, "the driver cannot use its ports")
            return
        for port in self._by_id.values():
            if not port.added:
                port.added = True
                self._pending[port.id, Event.DEVICE_ADD] = None
        self._tell()

    def _on_open(self, port: GuestPort) -> None:
        if port.ready:
            self._pending[port.id, Event.PORT_OPEN] = None
            self._tell()

    def _tell(self) -> None:
        """Send what is pending, as far as the driver has buffers for it."""
        if not (self._working and self.queues[CONTROL_RX].ready):
            return
        with self._contained():
            while self._pending:
                id, event = next(iter(self._pending))
                message = self._message(self._by_id[id], event)
                sent = self._to_driver.put(memoryview(message))
                if sent == 0:
                    return
                if sent < len(message):
                    raise GuestFault("request", "A control buffer is too small for its message")
                del self._pending[id, event]

    def _message(self, port: GuestPort, event: Event) -> bytes:
        if event is Event.PORT_OPEN:
            return pack(port.id, event, int(port.host_open))
        if event is Event.PORT_NAME:
            return pack(port.id, event, 1, port.name.encode())
        return pack(port.id, event, 0)

    def _put(self, port: GuestPort, data: memoryview) -> int:
        if self._working and port.rx.queue.ready:
            with self._contained():
                return port.rx.put(data)
        return 0

    def _end(self) -> None:
        """The guest has ended, the device is at rest."""
        for port in self._by_id.values():
            port.end(last_bytes(self, port.tx) if port.host_open else [])


async def build(config: Ports, context: DeviceContext) -> PortsDevice:
    """The device; it needs nothing of the host."""
    return PortsDevice(config, context)


PORTS = DeviceType(
    name="ports",
    virtio_id=VIRTIO_ID,
    flag="--ports",
    summary="named byte streams to programs in the guest, with flow control both ways",
    build=build,
    pci_class=PCI_CLASS,
)
Ports.device_type = PORTS
