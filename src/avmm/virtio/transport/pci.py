"""The virtio-pci transport, modern devices only (virtio 1.3 section 4.1)."""

from __future__ import annotations

import contextlib
import struct
import threading
from typing import Protocol

from avmm.bus.region import Deferred, Post, Region
from avmm.errors import HostError
from avmm.pci.function import Function, Identity
from avmm.pci.msix import VECTORS_MAX, Messages, Msix
from avmm.virtio.device import VirtioDevice
from avmm.virtio.transport.pci_common import COMMON_BYTES, CommonConfig
from avmm.virtio.transport.pci_vectors import Vectors

VENDOR_ID = 0x1AF4
DEVICE_ID_BASE = 0x1040

VENDOR_CAPABILITY_ID = 0x09
CFG_COMMON, CFG_NOTIFY, CFG_ISR, CFG_DEVICE, CFG_PCI = 1, 2, 3, 4, 5
"""cfg_type of struct virtio_pci_cap (4.1.4)."""

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


class Notifications(Protocol):
    """KVM's ioeventfds: kvm.vm.Vm, or a test's."""

    def ioeventfd(self, event_fd: int, gpa: int, size_bytes: int, value: int | None) -> None:
        """A write at `gpa` signals the eventfd."""
        ...

    def remove_ioeventfd(self, event_fd: int, gpa: int, size_bytes: int, value: int | None) -> None:
        """Undo ioeventfd()."""
        ...


class PciTransport:
    """A PCI function, and the bus Region behind its BAR.

    Read and written on vCPU threads, made and closed on the loop. Vectors and what follows from
    them are the loop's.

    common, msix: also hold Registers for the C loop of vCPUs.
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
        self.device = device
        self._notifications = notifications
        self._notify_bytes = notify_bytes
        self._registered: list[tuple[int, int]] = []
        self._registered_bar: int | None = None
        self._registering = threading.Lock()
        self.function = Function(_identity(device))
        self._bar = self.function.add_bar(BAR_BYTES, self)
        self._bar.on_move.append(self._move)
        self.function.after_write = self._register
        with contextlib.ExitStack() as made:
            made.callback(self.function.close)
            self.msix = Msix(
                self.function,
                self._bar,
                messages,
                vectors=min(len(device.queues) + 1, VECTORS_MAX),
                table_offset=TABLE,
                pba_offset=PBA,
            )
            made.callback(self.msix.close)
            self._vectors = Vectors(device.interrupts, len(device.queues), self.msix)
            self.common = CommonConfig(device, self._vectors)
            made.pop_all()
        self.common.on_status = self._show_interrupts
        self.msix.on_enable = self._switch_vectors
        self.msix.on_refused = self.common.ignore
        self._add_capabilities()

    def read(self, offset: int, size: int) -> int:
        """What the C loop does not answer."""
        part, at = offset & -_PART_BYTES, offset % _PART_BYTES
        if part == COMMON:
            return self.common.read(at, size)
        if part == DEVICE:
            return self.common.read_config(at, size)
        if part == PBA:
            return self.msix.read_pending(at, size)
        if offset >= TABLE:
            return self.msix.read_table(offset - TABLE, size)
        if (offset, size) == (ISR, 1):
            return self._take_isr()
        self.common.ignore()
        return 0

    def write(self, offset: int, size: int, value: int) -> Deferred | None:
        """Likewise."""
        value &= (1 << 8 * size) - 1
        part, at = offset & -_PART_BYTES, offset % _PART_BYTES
        if part == COMMON:
            return self.common.write(at, size, value)
        if part == DEVICE:
            return self.common.write_config(at, size, value)
        if part == NOTIFY:
            return self._notified(at)
        if offset >= TABLE:
            return self.msix.write_table(offset - TABLE, size, value)
        self.common.ignore()
        return None

    def close(self) -> None:
        """Give back vectors and registers; the device is at rest and no vCPU runs. Idempotent."""
        self._vectors.forget()
        self.msix.close()
        self.common.close()

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

    def _switch_vectors(self) -> None:
        self._vectors.apply()
        self._show_interrupts()

    def _show_interrupts(self) -> None:
        """Without MSI-X the function's Interrupt Status is that of the ISR status (4.1.4.5.1),
        which only a live device sets."""
        by_status = self.device.state.driver_ok and not self.msix.enabled
        interrupts = self.device.interrupts
        self.function.show_interrupts((lambda: interrupts.status != 0) if by_status else None)

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
            self.common.ignore()
            return None
        return Post(lambda: self.common.notify(index))

    def _move(self) -> None:
        """Let the registers follow the BAR."""
        self.common.registers.move(None if self._bar.gpa is None else self._bar.gpa + COMMON)

    def _register(self) -> None:
        """Let KVM's ioeventfds follow the BAR. On vCPU threads: the kernel takes up to milliseconds
        for each, which the loop has not."""
        with self._registering:
            bar = self._bar.gpa
            if bar == self._registered_bar:
                return
            self._registered_bar = bar
            for fd, gpa in self._registered:
                self._notifications.remove_ioeventfd(fd, gpa, self._notify_bytes, None)
            self._registered.clear()
            if bar is None:
                return
            for queue in self.device.queues:
                gpa = bar + NOTIFY + NOTIFY_OFF_MULTIPLIER * queue.index
                try:
                    self._notifications.ioeventfd(queue.kick_fd, gpa, self._notify_bytes, None)
                except HostError:
                    # A guest that puts one BAR over another; its notifications come as exits.
                    self.common.ignore()
                    continue
                self._registered.append((queue.kick_fd, gpa))


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
