"""virtio-rng: the host's random bytes (virtio 1.3 section 5.4)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec

from avmm.native import lib
from avmm.virtio.device import VirtioDevice
from avmm.virtio.devtype import DeviceContext, DeviceType

_QUEUE_SIZE = 64
_BUDGET_BYTES = 64 * 1024


class Rng(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A source of entropy for the guest."""

    id: Annotated[str | None, msgspec.Meta(description="name in logs and statistics")] = None

    device_type: ClassVar[DeviceType]


class RngDevice(VirtioDevice):
    """Fills what the driver offers, a bounded amount a turn."""

    def __init__(self, context: DeviceContext) -> None:
        super().__init__(RNG, context, offered=0, queue_sizes=(_QUEUE_SIZE,))

    def kick(self, index: int) -> bool:
        """Fill the driver's buffers."""
        queue = self.queues[index]
        result: int = lib.av_rng_kick(queue.ring, queue.kick_fd, _BUDGET_BYTES)
        if result < 0:
            raise self.failure(result, "getrandom")
        return result > 0


async def build(config: Rng, context: DeviceContext) -> RngDevice:
    """The device; it needs nothing of the host."""
    return RngDevice(context)


RNG = DeviceType(
    name="rng",
    virtio_id=4,
    flag="--rng",
    summary="random bytes from the host's getrandom",
    build=build,
)
Rng.device_type = RNG
