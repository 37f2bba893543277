"""The virtio-mmio transport, version 2 (virtio 1.3 section 4.2)."""

from __future__ import annotations

from collections.abc import Callable

from avmm.bus.region import Call, Deferred, Post
from avmm.mem.layout import VIRTIO_MMIO_SLOT_BYTES
from avmm.virtio.device import VirtioDevice
from avmm.virtio.queue import Queue

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


class MmioTransport:
    """One device's registers, a bus Region: read() and write() come from vCPU threads.

    Selectors and addresses are latched on the thread. What has consequences (status, queue
    ready, configuration) is a Call, so that it is over when the driver's instruction ends.
    Nothing here raises, whatever the guest does; accesses that mean nothing read 0 or are
    ignored, and are counted.
    """

    def __init__(self, device: VirtioDevice) -> None:
        self.device = device
        self._device_features_sel = 0
        self._driver_features_sel = 0
        self._queue_sel = 0
        self._reads: dict[int, Callable[[], int]] = {
            MAGIC_VALUE: lambda: _MAGIC,
            VERSION: lambda: 2,
            DEVICE_ID: lambda: device.device_type.virtio_id,
            VENDOR_ID: lambda: _VENDOR,
            DEVICE_FEATURES: self._device_features,
            QUEUE_SIZE_MAX: self._queue_size_max,
            QUEUE_READY: self._queue_ready,
            INTERRUPT_STATUS: lambda: device.interrupts.status,
            STATUS: lambda: device.state.status,
            CONFIG_GENERATION: lambda: device.config.generation,
            **{register: lambda: _LOW for register in SHM_REGISTERS},  # no such region
        }
        self._writes: dict[int, Callable[[int], Deferred | None]] = {
            DEVICE_FEATURES_SEL: self._select_device_features,
            DRIVER_FEATURES: self._driver_features,
            DRIVER_FEATURES_SEL: self._select_driver_features,
            QUEUE_SEL: self._select_queue,
            QUEUE_SIZE: self._set_queue_size,
            QUEUE_READY: self._set_queue_ready,
            QUEUE_NOTIFY: lambda value: Post(lambda: self._notify(value)),
            INTERRUPT_ACK: device.interrupts.acknowledge,
            STATUS: lambda value: Call(lambda: self._set_status(value)),
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
            at = offset - CONFIG
            return int.from_bytes(self.device.config.data[at : at + size], "little")
        register = self._reads.get(offset) if size == 4 else None
        if register is None:
            self._ignore()
            return 0
        return register()

    def write(self, offset: int, size: int, value: int) -> Deferred | None:
        """Likewise."""
        value &= (1 << 8 * size) - 1
        if offset >= CONFIG:
            data = value.to_bytes(size, "little")
            return Call(lambda: self.device.write_config(offset - CONFIG, data))
        if size != 4:
            self._ignore()
        elif offset in _ADDRESSES:
            self._set_address(offset, value)
        elif register := self._writes.get(offset):
            return register(value)
        else:
            self._ignore()
        return None

    def _ignore(self) -> None:
        # Two vCPUs may count as one here: it is a hint that a driver is wrong, not a sum.
        self.device.ignored += 1

    def _queue(self) -> Queue | None:
        queues = self.device.queues
        return queues[self._queue_sel] if self._queue_sel < len(queues) else None

    def _unready_queue(self) -> Queue | None:
        """The selected queue, if it may be set up now."""
        queue = self._queue()
        if queue is None or queue.ready:
            self._ignore()
            return None
        return queue

    def _device_features(self) -> int:
        if self._device_features_sel > 1:
            return 0
        return self.device.state.offered >> 32 * self._device_features_sel & _LOW

    def _queue_size_max(self) -> int:
        queue = self._queue()
        return queue.max_size if queue is not None else 0

    def _queue_ready(self) -> int:
        queue = self._queue()
        return int(queue.ready) if queue is not None else 0

    def _select_device_features(self, value: int) -> None:
        self._device_features_sel = value

    def _select_driver_features(self, value: int) -> None:
        self._driver_features_sel = value

    def _select_queue(self, value: int) -> None:
        self._queue_sel = value

    def _driver_features(self, value: int) -> None:
        """Words past the second hold features no device of ours offers: any bit there is one
        too many, and makes FEATURES_OK fail."""
        shift = 32 * min(self._driver_features_sel, 2)
        others = self.device.state.driver_features & ~(_LOW << shift)
        self.device.state.accept_features(others | value << shift)

    def _set_queue_size(self, value: int) -> None:
        if queue := self._unready_queue():
            queue.size = value

    def _set_address(self, offset: int, value: int) -> None:
        if queue := self._unready_queue():
            field, shift = _ADDRESSES[offset]
            others: int = getattr(queue, field) & ~(_LOW << shift)
            setattr(queue, field, others | value << shift)

    def _set_queue_ready(self, value: int) -> Deferred | None:
        queue = self._queue()
        if queue is None:
            self._ignore()
            return None
        return Call(lambda: self.device.set_queue_ready(queue, bool(value & 1)))

    async def _set_status(self, value: int) -> None:
        await self.device.set_status(value & 0xFF)
        if value & 0xFF == 0:
            self._device_features_sel = self._driver_features_sel = self._queue_sel = 0

    def _notify(self, value: int) -> None:
        if value < len(self.device.queues):
            self.device.queues[value].notify()
        else:
            self._ignore()
