"""What the transports do the same way: selectors, features, queues, status, configuration."""

from __future__ import annotations

from avmm.bus.region import Call, Deferred
from avmm.virtio.device import VirtioDevice
from avmm.virtio.queue import Queue

_LOW = 0xFFFF_FFFF


class Transport:
    """One device's registers, of which a transport says where they are.

    Called on vCPU threads. Selectors and addresses are latched there; what has consequences
    (status, queue ready, configuration) is a Call, so that it is over when the driver's
    instruction ends. Nothing here raises, whatever the guest does; accesses that mean nothing
    read 0 or are ignored, and are counted.
    """

    def __init__(self, device: VirtioDevice) -> None:
        self.device = device
        self.device_features_sel = 0
        self.driver_features_sel = 0
        self.queue_sel = 0

    def ignore(self) -> None:
        """Count an access that means nothing."""
        # Two vCPUs may count as one here: it is a hint that a driver is wrong, not a sum.
        self.device.ignored += 1

    def queue(self) -> Queue | None:
        """The selected queue."""
        queues = self.device.queues
        return queues[self.queue_sel] if self.queue_sel < len(queues) else None

    def unready_queue(self) -> Queue | None:
        """The selected queue, if it may be set up now."""
        queue = self.queue()
        if queue is None or queue.ready:
            self.ignore()
            return None
        return queue

    def device_features(self) -> int:
        """The selected word of the features offered."""
        if self.device_features_sel > 1:
            return 0
        return self.device.state.offered >> 32 * self.device_features_sel & _LOW

    def driver_features(self) -> int:
        """The selected word of the driver's features."""
        if self.driver_features_sel > 1:
            return 0
        return self.device.state.driver_features >> 32 * self.driver_features_sel & _LOW

    def queue_ready(self) -> int:
        """1 when the selected queue is set up."""
        queue = self.queue()
        return int(queue.ready) if queue is not None else 0

    def select_device_features(self, value: int) -> None:
        """Which word device_features() reads."""
        self.device_features_sel = value

    def select_driver_features(self, value: int) -> None:
        """Which word set_driver_features() writes."""
        self.driver_features_sel = value

    def select_queue(self, value: int) -> None:
        """Which queue the queue registers are of."""
        self.queue_sel = value

    def set_driver_features(self, value: int) -> None:
        """Words past the second hold features no device of ours offers: any bit there is one
        too many, and makes FEATURES_OK fail."""
        shift = 32 * min(self.driver_features_sel, 2)
        others = self.device.state.driver_features & ~(_LOW << shift)
        self.device.state.accept_features(others | value << shift)

    def set_queue_size(self, value: int) -> None:
        """The selected queue's size; checked when it becomes ready."""
        if queue := self.unready_queue():
            queue.size = value

    def set_queue_address(self, field: str, shift: int, value: int) -> None:
        """32 bits of one of the selected queue's addresses, from bit `shift` on."""
        if queue := self.unready_queue():
            others: int = getattr(queue, field) & ~(_LOW << shift)
            setattr(queue, field, others | value << shift)

    def set_queue_ready(self, ready: bool) -> Deferred | None:
        """The driver offers the selected queue, or takes it away."""
        queue = self.queue()
        if queue is None:
            self.ignore()
            return None
        return Call(lambda: self.device.set_queue_ready(queue, ready))

    async def set_status(self, value: int) -> None:
        """The driver wrote the status field; loop."""
        await self.device.set_status(value & 0xFF)
        if value & 0xFF == 0:
            self.device_features_sel = self.driver_features_sel = self.queue_sel = 0

    def notify(self, index: int) -> None:
        """A notification that KVM did not take; loop."""
        if index < len(self.device.queues):
            self.device.queues[index].notify()
        else:
            self.ignore()

    def read_config(self, at: int, size: int) -> int:
        """The device's configuration, bytes of any alignment; zeros past its end."""
        return int.from_bytes(self.device.config.data[at : at + size], "little")

    def write_config(self, at: int, size: int, value: int) -> Deferred:
        """Likewise."""
        data = value.to_bytes(size, "little")
        return Call(lambda: self.device.write_config(at, data))
