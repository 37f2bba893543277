"""struct virtio_pci_common_cfg (virtio 1.3 section 4.1.4.3)."""

from __future__ import annotations

import threading
from collections.abc import Callable

from avmm.bus.region import Call, Deferred
from avmm.bus.registers import Registers
from avmm.virtio.device import ConfigSpace, VirtioDevice
from avmm.virtio.state import FEATURES_OK
from avmm.virtio.transport.base import Transport
from avmm.virtio.transport.pci_vectors import NO_VECTOR, Vectors

DEVICE_FEATURE_SELECT = 0x00
DEVICE_FEATURE = 0x04
DRIVER_FEATURE_SELECT = 0x08
DRIVER_FEATURE = 0x0C
CONFIG_MSIX_VECTOR = 0x10
NUM_QUEUES = 0x12
DEVICE_STATUS = 0x14
CONFIG_GENERATION = 0x15
QUEUE_SELECT = 0x16
QUEUE_SIZE = 0x18
QUEUE_MSIX_VECTOR = 0x1A
QUEUE_ENABLE = 0x1C
QUEUE_NOTIFY_OFF = 0x1E
QUEUE_DESC = 0x20
QUEUE_DRIVER = 0x28
QUEUE_DEVICE = 0x30
COMMON_BYTES = 0x38

_SELECTS = ((DEVICE_FEATURE_SELECT, 4), (DRIVER_FEATURE_SELECT, 4), (QUEUE_SELECT, 2))
_LOW = 0xFFFF_FFFF
_ALL = 0xFFFF_FFFF_FFFF_FFFF


class CommonConfig(Transport):
    """The fields that a driver sets a device up with.

    The C loop answers what has no consequence: nearly all reads, and writes of features, queue
    sizes and addresses, which are taken over when the driver goes on. A queue costs a driver some
    twenty accesses, and four exits to Python: selectors that change, vectors, the enabling.

    on_status: called on the loop after the status changed.
    """

    def __init__(self, device: VirtioDevice, vectors: Vectors) -> None:
        super().__init__(device)
        self._vectors = vectors
        self.on_status: Callable[[], None] = lambda: None
        self._seen = device.config
        self._generation = 0
        self._config_lock = threading.Lock()
        self.registers = Registers(COMMON_BYTES)
        self.registers.define(NUM_QUEUES, 2, len(device.queues))
        for field, size in (*_SELECTS, (CONFIG_MSIX_VECTOR, 2), (QUEUE_MSIX_VECTOR, 2)):
            self.registers.watch(field, size, _LOW)
        self.registers.watch(QUEUE_ENABLE, 2, _LOW)
        self.registers.hand_over(DEVICE_STATUS, 1, reads=False)
        self.registers.hand_over(CONFIG_GENERATION, 1, reads=True)
        device.state.on_status = self._show_status
        self._show_status(device.state.status)
        self._show()

    def read(self, at: int, size: int) -> int:
        """A field the C loop does not answer, or any; fields are read whole (4.1.3.1)."""
        if (at, size) == (CONFIG_GENERATION, 1):
            return self._see_config()[1]
        if at >= COMMON_BYTES:
            self.ignore()
            return 0
        return self.registers.get(at, size)

    def read_config(self, at: int, size: int) -> int:
        """A field of the configuration as it is now, which counts as seen."""
        return self.config_bytes(self._see_config()[0], at, size)

    def write(self, at: int, size: int, value: int) -> Deferred | None:
        """A write with consequences, or any."""
        if (at, size) == (DEVICE_STATUS, 1):
            return Call(lambda: self.set_status(value))
        if (at < QUEUE_SELECT and at + size > DEVICE_STATUS) or at >= COMMON_BYTES:
            self.ignore()
            return None
        self._take()
        self.registers.put(at, size, value)
        selected = tuple(self.registers.get(*field) for field in _SELECTS)
        if selected == (self.device_features_sel, self.driver_features_sel, self.queue_sel):
            return Call(self._follow)
        self.device_features_sel, self.driver_features_sel, self.queue_sel = selected
        self._show()
        return None

    async def set_status(self, value: int) -> None:
        """The driver wrote the status field; a reset takes the vectors back (4.1.5.1.2.1)."""
        self._take()
        await super().set_status(value)
        if value & 0xFF == 0:
            self._vectors.forget()
        self._show()

    def close(self) -> None:
        """Free the registers; no vCPU may run any more. Idempotent."""
        self.device.state.on_status = lambda status: None
        self.registers.close()

    async def _follow(self) -> None:
        """Do what the vectors and queue_enable ask for."""
        self._take()
        get, queue = self.registers.get, self.queue()
        self._vectors.set_config(get(CONFIG_MSIX_VECTOR, 2))
        if queue is not None:
            self._vectors.set_queue(queue.index, get(QUEUE_MSIX_VECTOR, 2))
            enable = get(QUEUE_ENABLE, 2)
            if enable == 1 and not queue.ready:
                await self.device.set_queue_ready(queue, True)
            elif enable != int(queue.ready):
                self.ignore()  # a driver does not write 0 (4.1.4.3.2): a queue ends with a reset
        self._show()

    def _see_config(self) -> tuple[ConfigSpace, int]:
        """The configuration, and its generation as the driver knows it (4.1.4.3.1).

        That has 8 bits. It counts only what a driver looked at, so that no number of changes
        between two looks passes for none.
        """
        # Without the lock a vCPU could have new bytes while another is about to count them.
        with self._config_lock:
            if self.device.config is not self._seen:
                self._seen = self.device.config
                self._generation = (self._generation + 1) & 0xFF
            return self._seen, self._generation

    def _take(self) -> None:
        """Take over what the driver has written with these selectors."""
        get, queue = self.registers.get, self.queue()
        self.set_driver_features(get(DRIVER_FEATURE, 4))
        if queue is not None and not queue.ready:
            queue.size = get(QUEUE_SIZE, 2)
            queue.desc_gpa = get(QUEUE_DESC, 8)
            queue.driver_gpa = get(QUEUE_DRIVER, 8)
            queue.device_gpa = get(QUEUE_DEVICE, 8)

    def _show(self) -> None:
        """Let the registers say how things are, by the selectors."""
        define = self.registers.define
        define(DEVICE_FEATURE_SELECT, 4, self.device_features_sel, writable=_LOW)
        define(DEVICE_FEATURE, 4, self.device_features())
        define(DRIVER_FEATURE_SELECT, 4, self.driver_features_sel, writable=_LOW)
        fixed = self.device.state.status & FEATURES_OK
        define(DRIVER_FEATURE, 4, self.driver_features(), writable=0 if fixed else _LOW)
        define(CONFIG_MSIX_VECTOR, 2, self._vectors.config, writable=_LOW)
        define(QUEUE_SELECT, 2, self.queue_sel, writable=_LOW)
        queue = self.queue()
        if queue is None:  # which size 0 says (4.1.4.3.1)
            for field in range(QUEUE_SIZE, COMMON_BYTES, 8):
                define(field, 8, 0)
            define(QUEUE_MSIX_VECTOR, 2, NO_VECTOR)
            return
        writable = 0 if queue.ready else _ALL
        define(QUEUE_SIZE, 2, queue.size, writable=writable)
        define(QUEUE_MSIX_VECTOR, 2, self._vectors.queues[queue.index], writable=_LOW)
        define(QUEUE_ENABLE, 2, int(queue.ready), writable=_LOW)
        define(QUEUE_NOTIFY_OFF, 2, queue.index)
        define(QUEUE_DESC, 8, queue.desc_gpa, writable=writable)
        define(QUEUE_DRIVER, 8, queue.driver_gpa, writable=writable)
        define(QUEUE_DEVICE, 8, queue.device_gpa, writable=writable)

    def _show_status(self, status: int) -> None:
        self.registers.define(DEVICE_STATUS, 1, status)
        self.on_status()
