"""virtio-console: one fast console, the guest's /dev/hvc0 (virtio 1.3 section 5.3).

Named ports are a device of their own (ports.py), though one device could have both: with
MULTIPORT a console learns its size by the message RESIZE alone, whose two fields Linux had the
wrong way round until 6.15. Without it the size is in the configuration space, and never was wrong.
"""

from __future__ import annotations

import contextlib
import struct
from typing import Annotated, ClassVar

import msgspec

from avmm.config import Checked
from avmm.console.console import SCROLLBACK_BYTES, Console, check_scrollback
from avmm.errors import GuestFault
from avmm.virtio import features
from avmm.virtio.byte_queue import TAKE_BYTES, ByteQueue
from avmm.virtio.device import VirtioDevice
from avmm.virtio.devtype import DeviceContext, DeviceType

RX, TX = 0, 1
VIRTIO_ID = 3
PCI_CLASS = 0x07_8000
QUEUE_SIZE = 64
CONFIG = struct.Struct("<HHII")
"""struct virtio_console_config: columns, rows, max_nr_ports, emerg_wr (5.3.4)."""
_EMERG_WR_AT = 8
_LAST_BYTES = 4 << 20
_SIZE_TOLD_TIMES = 10
_SIZE_TOLD_EVERY_S = 0.1


class VirtioConsole(Checked, frozen=True):
    """A console on virtio, /dev/hvc0 of the guest; it becomes the microVM's `console`."""

    scrollback: Annotated[str | int, msgspec.Meta(description="how much of its output is kept")] = (
        SCROLLBACK_BYTES
    )
    id: Annotated[str | None, msgspec.Meta(description="name in logs and statistics")] = None

    device_type: ClassVar[DeviceType]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scrollback(self.scrollback, "console: scrollback")


class ConsoleDevice(VirtioDevice):
    """Takes what the guest writes at once, always: Linux waits for that with a lock held."""

    def __init__(self, config: VirtioConsole, context: DeviceContext) -> None:
        offered = features.CONSOLE_SIZE | features.CONSOLE_EMERG_WRITE
        super().__init__(CONSOLE, context, offered=offered, queue_sizes=(QUEUE_SIZE,) * 2)
        self._input = ByteQueue(self.queues[RX], context)
        self._output = ByteQueue(self.queues[TX], context)
        self._working = False
        self._size_telling = 0
        self._size_told_s = 0.0
        self.console = Console(
            "console",
            self._put,
            scrollback_bytes=check_scrollback(config.scrollback, "scrollback"),
            resize=self._set_size,
        )
        self.set_config(CONFIG.pack(0, 0, 1, 0))
        context.stack.callback(self._end)

    def on_activate(self, negotiated: int) -> None:
        """A new driver is to know the size."""
        self._size_telling = _SIZE_TOLD_TIMES
        self._size_told_s = 0.0

    def on_resume(self) -> None:
        """Input may have come while the device was at rest."""
        self._working = True
        self.console.feed()

    def on_hold(self) -> None:
        """No more input."""
        self._working = False

    def on_queue_stop(self, index: int) -> None:
        """What was begun is the driver's again."""
        (self._output if index == TX else self._input).forget()

    def kick(self, index: int) -> bool:
        """The driver wrote, or has more buffers to be filled."""
        if index == RX:
            self._input.take_kick()
            self.console.feed()
            return False
        self._output.take_kick()
        data, more = self._output.take()
        if data:
            self.console.receive(data)
            if self._size_telling:
                self._tell_size()
        return more

    def on_config_write(self, offset: int, data: bytes) -> None:
        """The emergency write: a byte from a driver in no state for queues (5.3.4)."""
        if offset == _EMERG_WR_AT:
            self.console.receive(data[:1])
        else:
            self.ignored += 1

    def counters(self) -> dict[str, int]:
        """Bytes on the queues, and what readers missed."""
        return {
            "tx_bytes": self._output.count_bytes,
            "rx_bytes": self._input.count_bytes,
            "lost_bytes": self.console.statistics().lost_bytes,
        }

    def _put(self, data: memoryview) -> int:
        if self._working and self.queues[RX].ready:
            with self._contained():
                return self._input.put(data)
        return 0

    def _set_size(self, columns: int, rows: int) -> None:
        config = CONFIG.pack(columns, rows, 1, 0)
        if config != self.config.data:
            self.set_config(config)

    def _tell_size(self) -> None:
        """Linux reads the size only when it is told of a change, and not before its console is
        there: some time after the first bytes came. So a new driver is told again and again, at
        first, when it writes."""
        now_s = self.context.loop.time()
        if any(self.config.data[:4]) and now_s - self._size_told_s >= _SIZE_TOLD_EVERY_S:
            self._size_telling -= 1
            self._size_told_s = now_s
            self.interrupts.config.raise_config()

    def _end(self) -> None:
        """The guest has ended, the device is at rest."""
        for data in last_bytes(self, self._output):
            self.console.receive(data)
        self.console.close()


def last_bytes(device: VirtioDevice, queue: ByteQueue) -> list[bytes]:
    """What a guest that has ended left in its queue; bounded."""
    found: list[bytes] = []
    if device.state.driver_ok and device.state.live and queue.queue.ready:
        more = True
        with contextlib.suppress(GuestFault):  # nobody is left to be told
            while more and len(found) < _LAST_BYTES // TAKE_BYTES:
                data, more = queue.take()
                found.append(data)
    return found


async def build(config: VirtioConsole, context: DeviceContext) -> ConsoleDevice:
    """The device; it needs nothing of the host."""
    return ConsoleDevice(config, context)


CONSOLE = DeviceType(
    name="console",
    virtio_id=VIRTIO_ID,
    flag="--console",
    summary="a console on virtio, /dev/hvc0, beside the serial port: fast, and it knows its size",
    build=build,
    pci_class=PCI_CLASS,
)
VirtioConsole.device_type = CONSOLE
