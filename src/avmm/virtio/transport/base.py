"""What the transports do the same way: selectors, features, queues, status, configuration."""

from __future__ import annotations

from avmm.bus.region import Call, Deferred
from avmm.virtio.device import ConfigSpace, VirtioDevice
from avmm.virtio.queue import Queue

_LOW = 0xFFFF_FFFF


class Transport:
    """What one device's registers mean; a transport says where they are and what is latched.

    Called on vCPU threads. What has consequences (status, queue ready, configuration) is a Call,
    so that it is over when the driver's instruction ends. Nothing here raises, whatever the guest
    does; accesses that mean nothing read 0 or are ignored, and are counted.
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

    def device_features(self) -> int:
        """The selected word of the features offered."""
        if self.device_features_sel > 1:
            return 0
        return self.device.state.offered >> 32 * self.device_features_sel & _LOW

    def driver_features(self) -> int:
        """The selected word of the driver's features."""
        return self.device.state.driver_features >> self._driver_features_shift() & _LOW

    def queue_ready(self) -> int:
        """1 when the selected queue is set up."""
        queue = self.queue()
        return int(queue.ready) if queue is not None else 0

    def set_driver_features(self, value: int) -> None:
        """Set the selected word of the driver's features."""
        shift = self._driver_features_shift()
        others = self.device.state.driver_features & ~(_LOW << shift)
        self.device.state.accept_features(others | value << shift)

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
        return self.config_bytes(self.device.config, at, size)

    @staticmethod
    def config_bytes(config: ConfigSpace, at: int, size: int) -> int:
        """A field of a configuration."""
        return int.from_bytes(config.data[at : at + size], "little")

    def write_config(self, at: int, size: int, value: int) -> Deferred:
        """Likewise."""
        data = value.to_bytes(size, "little")
        return Call(lambda: self.device.write_config(at, data))

    def _driver_features_shift(self) -> int:
        """Words past the second hold features no device of ours offers: any bit there is one
        too many, and makes FEATURES_OK fail."""
        return 32 * min(self.driver_features_sel, 2)
