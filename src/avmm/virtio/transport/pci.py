"""The virtio-pci transport, modern devices only (virtio 1.3 section 4.1)."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import Protocol

from avmm.bus.region import Call, Deferred, Post, Region
from avmm.errors import HostError
from avmm.pci.function import Function, Identity
from avmm.pci.msix import VECTORS_MAX, Messages, Msix
from avmm.virtio.device import VirtioDevice
from avmm.virtio.interrupt import NO_FD, Interrupt
from avmm.virtio.transport.base import Transport

VENDOR_ID = 0x1AF4
DEVICE_ID_BASE = 0x1040
NO_VECTOR = 0xFFFF

VENDOR_CAPABILITY_ID = 0x09
CFG_COMMON, CFG_NOTIFY, CFG_ISR, CFG_DEVICE, CFG_PCI = 1, 2, 3, 4, 5
"""cfg_type of struct virtio_pci_cap (4.1.4)."""

# struct virtio_pci_common_cfg (4.1.4.3).
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

# The one BAR.
BAR_BYTES = 0x10000
COMMON = 0x0000
ISR = 0x1000
DEVICE = 0x2000
PBA = 0x3000
NOTIFY = 0x4000
TABLE = 0x8000
_PART_BYTES = 0x1000
NOTIFY_OFF_MULTIPLIER = 4

_LOW = 0xFFFF_FFFF
_ADDRESSES = {
    QUEUE_DESC: ("desc_gpa", 0),
    QUEUE_DESC + 4: ("desc_gpa", 32),
    QUEUE_DRIVER: ("driver_gpa", 0),
    QUEUE_DRIVER + 4: ("driver_gpa", 32),
    QUEUE_DEVICE: ("device_gpa", 0),
    QUEUE_DEVICE + 4: ("device_gpa", 32),
}


class Notifications(Protocol):
    """KVM's ioeventfds: kvm.vm.Vm, or a test's."""

    def ioeventfd(self, event_fd: int, gpa: int, size_bytes: int, value: int | None) -> None:
        """A write at `gpa` signals the eventfd."""
        ...

    def remove_ioeventfd(self, event_fd: int, gpa: int, size_bytes: int, value: int | None) -> None:
        """Undo ioeventfd()."""
        ...


class PciTransport(Transport):
    """A PCI function, and the bus Region behind its BAR.

    Read and written on vCPU threads, made and closed on the loop. Vectors and what follows from
    them are the loop's.

    notify_bytes: the width of a notification that KVM takes; 0: any.
    """

    def __init__(
        self,
        device: VirtioDevice,
        messages: Messages,
        notifications: Notifications,
        *,
        notify_bytes: int,
    ) -> None:
        super().__init__(device)
        self._notifications = notifications
        self._notify_bytes = notify_bytes
        self._registered: list[tuple[int, int]] = []
        self._config_vector = NO_VECTOR
        self._queue_vectors = [NO_VECTOR] * len(device.queues)
        self.function = Function(_identity(device))
        self._bar = self.function.add_bar(BAR_BYTES, self)
        self._bar.on_move.append(self._register_notifications)
        self.msix = Msix(
            self.function,
            self._bar,
            messages,
            vectors=min(len(device.queues) + 1, VECTORS_MAX),
            table_offset=TABLE,
            pba_offset=PBA,
        )
        self.msix.on_enable = self._apply_vectors
        self.msix.on_refused = self.ignore
        self._add_capabilities()
        self._reads = self._common_reads()
        self._writes = self._common_writes()

    def read(self, offset: int, size: int) -> int:
        """Fields are read whole (4.1.3.1); the device's configuration is bytes."""
        part, at = offset & -_PART_BYTES, offset % _PART_BYTES
        if part == DEVICE:
            return self.read_config(at, size)
        if part == PBA:
            return self.msix.read_pending(at, size)
        if offset >= TABLE:
            return self.msix.read_table(offset - TABLE, size)
        if (offset, size) == (ISR, 1):
            return self._take_isr()
        if field := self._reads.get((offset, size)):
            return field()
        self.ignore()
        return 0

    def write(self, offset: int, size: int, value: int) -> Deferred | None:
        """Likewise."""
        value &= (1 << 8 * size) - 1
        part, at = offset & -_PART_BYTES, offset % _PART_BYTES
        if part == DEVICE:
            return self.write_config(at, size, value)
        if part == NOTIFY:
            return self._notified(at)
        if offset >= TABLE:
            return self.msix.write_table(offset - TABLE, size, value)
        if field := self._writes.get((offset, size)):
            return field(value)
        self.ignore()
        return None

    def close(self) -> None:
        """Give back the vectors; the device is at rest and no vCPU runs. Idempotent."""
        self._forget_vectors()
        self.msix.close()

    async def set_status(self, value: int) -> None:
        """The driver wrote the status field; a reset takes the vectors back (4.1.5.1.2.1)."""
        await super().set_status(value)
        if value & 0xFF == 0:
            self._forget_vectors()

    def _add_capabilities(self) -> None:
        add = self.function.add_capability
        add(VENDOR_CAPABILITY_ID, _capability(CFG_COMMON, COMMON, COMMON_BYTES))
        notify_bytes = NOTIFY_OFF_MULTIPLIER * len(self.device.queues)
        multiplier = NOTIFY_OFF_MULTIPLIER.to_bytes(4, "little")
        add(VENDOR_CAPABILITY_ID, _capability(CFG_NOTIFY, NOTIFY, notify_bytes, multiplier))
        add(VENDOR_CAPABILITY_ID, _capability(CFG_ISR, ISR, 1))
        if self.device.config.data:
            add(VENDOR_CAPABILITY_ID, _capability(CFG_DEVICE, DEVICE, _PART_BYTES))
        # The driver writes bar, offset and length; then pci_cfg_data is what is there (4.1.4.9).
        writable = b"\0\0\xff\0\0\0" + b"\xff" * 8
        at = add(VENDOR_CAPABILITY_ID, _capability(CFG_PCI, 0, 0, bytes(4)), writable)
        self.function.add_window(at + 16, 4, _ConfigAccess(self.function, at, self))

    def _common_reads(self) -> dict[tuple[int, int], Callable[[], int]]:
        device = self.device
        reads: dict[tuple[int, int], Callable[[], int]] = {
            (DEVICE_FEATURE_SELECT, 4): lambda: self.device_features_sel,
            (DEVICE_FEATURE, 4): self.device_features,
            (DRIVER_FEATURE_SELECT, 4): lambda: self.driver_features_sel,
            (DRIVER_FEATURE, 4): self.driver_features,
            (CONFIG_MSIX_VECTOR, 2): lambda: self._config_vector,
            (NUM_QUEUES, 2): lambda: len(device.queues),
            (DEVICE_STATUS, 1): lambda: device.state.status,
            (CONFIG_GENERATION, 1): lambda: device.config.generation & 0xFF,
            (QUEUE_SELECT, 2): lambda: self.queue_sel,
            (QUEUE_SIZE, 2): lambda: self._of_queue("size"),
            (QUEUE_MSIX_VECTOR, 2): self._queue_vector,
            (QUEUE_ENABLE, 2): self.queue_ready,
            (QUEUE_NOTIFY_OFF, 2): lambda: self._of_queue("index"),
        }
        for offset, (name, shift) in _ADDRESSES.items():
            reads[offset, 4] = functools.partial(self._queue_address, name, shift)
        return reads

    def _common_writes(self) -> dict[tuple[int, int], Callable[[int], Deferred | None]]:
        writes: dict[tuple[int, int], Callable[[int], Deferred | None]] = {
            (DEVICE_FEATURE_SELECT, 4): self.select_device_features,
            (DRIVER_FEATURE_SELECT, 4): self.select_driver_features,
            (DRIVER_FEATURE, 4): self.set_driver_features,
            (CONFIG_MSIX_VECTOR, 2): lambda value: Call(lambda: self._set_config_vector(value)),
            (DEVICE_STATUS, 1): lambda value: Call(lambda: self.set_status(value)),
            (QUEUE_SELECT, 2): self.select_queue,
            (QUEUE_SIZE, 2): self.set_queue_size,
            (QUEUE_MSIX_VECTOR, 2): self._write_queue_vector,
            (QUEUE_ENABLE, 2): self._enable_queue,
        }
        for offset, (name, shift) in _ADDRESSES.items():
            writes[offset, 4] = functools.partial(self.set_queue_address, name, shift)
        return writes

    def _of_queue(self, field: str) -> int:
        """A field of the selected queue; 0 when there is none, which says so (4.1.4.3.1)."""
        queue = self.queue()
        return 0 if queue is None else int(getattr(queue, field))

    def _queue_address(self, field: str, shift: int) -> int:
        return self._of_queue(field) >> shift & _LOW

    def _enable_queue(self, value: int) -> Deferred | None:
        if value == 1:
            return self.set_queue_ready(True)
        self.ignore()  # a driver does not write 0 (4.1.4.3.2): a queue ends with a reset
        return None

    def _take_isr(self) -> int:
        """Reading the ISR status clears it (4.1.4.5). It tells of all that came since, on
        whatever vector, which is how a driver that uses none finds out."""
        status = self.device.interrupts.status
        self.device.interrupts.acknowledge(status)
        return status

    def _notified(self, at: int) -> Deferred | None:
        """A notification that KVM did not take: a width it does not know, or a bad place."""
        index, rest = divmod(at, NOTIFY_OFF_MULTIPLIER)
        queues = self.device.queues
        if rest or index >= len(queues) or not queues[index].ready:
            self.ignore()
            return None
        return Post(lambda: self.notify(index))

    def _register_notifications(self) -> None:
        """Let KVM's ioeventfds follow the BAR."""
        for fd, gpa in self._registered:
            self._notifications.remove_ioeventfd(fd, gpa, self._notify_bytes, None)
        self._registered.clear()
        if self._bar.gpa is None:
            return
        for queue in self.device.queues:
            gpa = self._bar.gpa + NOTIFY + NOTIFY_OFF_MULTIPLIER * queue.index
            try:
                self._notifications.ioeventfd(queue.kick_fd, gpa, self._notify_bytes, None)
            except HostError:
                # A guest that puts one BAR over another; its notifications come as exits.
                self.ignore()
                continue
            self._registered.append((queue.kick_fd, gpa))

    def _queue_vector(self) -> int:
        queue = self.queue()
        return NO_VECTOR if queue is None else self._queue_vectors[queue.index]

    def _write_queue_vector(self, value: int) -> Deferred | None:
        queue = self.queue()
        if queue is None:
            self.ignore()
            return None
        return Call(lambda: self._set_queue_vector(queue.index, value))

    def _set_config_vector(self, value: int) -> None:
        self._config_vector = self._acceptable(value)
        self._apply(self.device.interrupts.config, self._config_vector)

    def _set_queue_vector(self, index: int, value: int) -> None:
        self._queue_vectors[index] = self._acceptable(value)
        self._apply(self.device.interrupts.queue(index), self._queue_vectors[index])

    def _forget_vectors(self) -> None:
        self._config_vector = NO_VECTOR
        self._queue_vectors = [NO_VECTOR] * len(self._queue_vectors)
        self._apply_vectors()

    def _acceptable(self, vector: int) -> int:
        """A vector that does not exist reads back as none: the driver's to notice (4.1.5.1.2)."""
        return vector if vector < len(self.msix) else NO_VECTOR

    def _apply_vectors(self) -> None:
        interrupts = self.device.interrupts
        self._apply(interrupts.config, self._config_vector)
        for index, vector in enumerate(self._queue_vectors):
            self._apply(interrupts.queue(index), vector)

    def _apply(self, interrupt: Interrupt, vector: int) -> None:
        """Without MSI-X, and without a vector, only the ISR status tells."""
        connected = self.msix.enabled and vector != NO_VECTOR
        interrupt.set_fd(self.msix.fd(vector) if connected else NO_FD)


class _ConfigAccess:
    """pci_cfg_data: the BAR through configuration space (4.1.4.9), for those who cannot map it."""

    def __init__(self, function: Function, capability: int, bar: Region) -> None:
        self._function = function
        self._capability = capability
        self._bar = bar

    def read(self, offset: int, size: int) -> int:
        """What is at the place the capability names; its length is the access's."""
        place = self._place(offset, size)
        return 0 if place is None else self._bar.read(*place)

    def write(self, offset: int, size: int, value: int) -> Deferred | None:
        """Likewise."""
        place = self._place(offset, size)
        return None if place is None else self._bar.write(*place, value)

    def _place(self, offset: int, size: int) -> tuple[int, int] | None:
        get = self._function.registers.get
        bar, at, length = (get(self._capability + o, s) for o, s in ((4, 1), (8, 4), (12, 4)))
        sound = (bar, offset, length) == (0, 0, size) and at % length == 0
        return (at, length) if sound and at + length <= BAR_BYTES else None


def _identity(device: VirtioDevice) -> Identity:
    kind = device.device_type
    device_id = DEVICE_ID_BASE + kind.virtio_id
    return Identity(
        vendor_id=VENDOR_ID,
        device_id=device_id,
        class_code=kind.pci_class,
        revision=1,
        subsystem_vendor_id=VENDOR_ID,
        subsystem_id=device_id,
    )


def _capability(cfg_type: int, offset: int, length: int, more: bytes = b"") -> bytes:
    """struct virtio_pci_cap of BAR 0, from cap_len on."""
    return struct.pack("<BBBBHII", 16 + len(more), cfg_type, 0, 0, 0, offset, length) + more
