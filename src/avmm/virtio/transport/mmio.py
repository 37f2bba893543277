"""The virtio-mmio transport, version 2 (virtio 1.3 section 4.2)."""

from __future__ import annotations

from collections.abc import Callable

from avmm.bus.region import Call, Deferred, Post
from avmm.mem.layout import VIRTIO_MMIO_SLOT_BYTES
from avmm.virtio.device import VirtioDevice
from avmm.virtio.queue import Queue
from avmm.virtio.transport.base import Transport

SIZE_BYTES = VIRTIO_MMIO_SLOT_BYTES

MAGIC_VALUE = 0x000
VERSION = 0x004
DEVICE_ID = 0x008
VENDOR_ID = 0x00C
DEVICE_FEATURES = 0x010
DEVICE_FEATURES_SEL = 0x014
DRIVER_FEATURES = 0x020
DRIVER_FEATURES_SEL = 0x024
QUEUE_SEL = 0x030
QUEUE_SIZE_MAX = 0x034
QUEUE_SIZE = 0x038
QUEUE_READY = 0x044
QUEUE_NOTIFY = 0x050
INTERRUPT_STATUS = 0x060
INTERRUPT_ACK = 0x064
STATUS = 0x070
QUEUE_DESC_LOW, QUEUE_DESC_HIGH = 0x080, 0x084
QUEUE_DRIVER_LOW, QUEUE_DRIVER_HIGH = 0x090, 0x094
QUEUE_DEVICE_LOW, QUEUE_DEVICE_HIGH = 0x0A0, 0x0A4
SHM_SEL = 0x0AC
SHM_REGISTERS = (0x0B0, 0x0B4, 0x0B8, 0x0BC)
CONFIG_GENERATION = 0x0FC
CONFIG = 0x100

_MAGIC = int.from_bytes(b"virt", "little")
_VENDOR = int.from_bytes(b"avmm", "little")
_LOW = 0xFFFF_FFFF

_ADDRESSES = {
    QUEUE_DESC_LOW: ("desc_gpa", 0),
    QUEUE_DESC_HIGH: ("desc_gpa", 32),
    QUEUE_DRIVER_LOW: ("driver_gpa", 0),
    QUEUE_DRIVER_HIGH: ("driver_gpa", 32),
    QUEUE_DEVICE_LOW: ("device_gpa", 0),
    QUEUE_DEVICE_HIGH: ("device_gpa", 32),
}


class MmioTransport(Transport):
    """A bus Region: read() and write() come from vCPU threads, which latch selectors and
    addresses."""

    def __init__(self, device: VirtioDevice) -> None:
        super().__init__(device)
        self._reads: dict[int, Callable[[], int]] = {
            MAGIC_VALUE: lambda: _MAGIC,
            VERSION: lambda: 2,
            DEVICE_ID: lambda: device.device_type.virtio_id,
            VENDOR_ID: lambda: _VENDOR,
            DEVICE_FEATURES: self.device_features,
            QUEUE_SIZE_MAX: self._queue_size_max,
            QUEUE_READY: self.queue_ready,
            INTERRUPT_STATUS: lambda: device.interrupts.status,
            STATUS: lambda: device.state.status,
            CONFIG_GENERATION: lambda: device.config.generation,
            **{register: lambda: _LOW for register in SHM_REGISTERS},  # no such region
        }
        self._writes: dict[int, Callable[[int], Deferred | None]] = {
            DEVICE_FEATURES_SEL: self._select_device_features,
            DRIVER_FEATURES: self.set_driver_features,
            DRIVER_FEATURES_SEL: self._select_driver_features,
            QUEUE_SEL: self._select_queue,
            QUEUE_SIZE: self._set_queue_size,
            QUEUE_READY: lambda value: self._set_queue_ready(bool(value & 1)),
            QUEUE_NOTIFY: lambda value: Post(lambda: self.notify(value)),
            INTERRUPT_ACK: device.interrupts.acknowledge,
            STATUS: lambda value: Call(lambda: self.set_status(value)),
            SHM_SEL: lambda value: None,
        }

    def kick_registrations(self) -> list[tuple[int, int, int]]:
        """(offset, value, eventfd) of each queue's notification, for KVM's ioeventfd.

        With these, a QueueNotify write comes here only for a value that names no queue, or where
        the host's KVM could not decode the instruction.
        """
        return [(QUEUE_NOTIFY, queue.index, queue.kick_fd) for queue in self.device.queues]

    def read(self, offset: int, size: int) -> int:
        """Registers are 32 bits wide and aligned (4.2.2.2); the configuration is bytes."""
        if offset >= CONFIG:
            return self.read_config(offset - CONFIG, size)
        register = self._reads.get(offset) if size == 4 else None
        if register is None:
            self.ignore()
            return 0
        return register()

    def write(self, offset: int, size: int, value: int) -> Deferred | None:
        """Likewise."""
        value &= (1 << 8 * size) - 1
        if offset >= CONFIG:
            return self.write_config(offset - CONFIG, size, value)
        if size != 4:
            self.ignore()
        elif offset in _ADDRESSES:
            self._set_queue_address(*_ADDRESSES[offset], value)
        elif register := self._writes.get(offset):
            return register(value)
        else:
            self.ignore()
        return None

    def _queue_size_max(self) -> int:
        queue = self.queue()
        return queue.max_size if queue is not None else 0

    def _unready_queue(self) -> Queue | None:
        """The selected queue, if it may be set up now."""
        queue = self.queue()
        if queue is None or queue.ready:
            self.ignore()
            return None
        return queue

    def _select_device_features(self, value: int) -> None:
        self.device_features_sel = value

    def _select_driver_features(self, value: int) -> None:
        self.driver_features_sel = value

    def _select_queue(self, value: int) -> None:
        self.queue_sel = value

    def _set_queue_size(self, value: int) -> None:
        if queue := self._unready_queue():
            queue.size = value

    def _set_queue_address(self, field: str, shift: int, value: int) -> None:
        if queue := self._unready_queue():
            others: int = getattr(queue, field) & ~(_LOW << shift)
            setattr(queue, field, others | value << shift)

    def _set_queue_ready(self, ready: bool) -> Deferred | None:
        queue = self.queue()
        if queue is None:
            self.ignore()
            return None
        return Call(lambda: self.device.set_queue_ready(queue, ready))
