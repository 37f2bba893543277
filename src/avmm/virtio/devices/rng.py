"""virtio-rng: the host's random bytes (virtio 1.3 section 5.4)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec

from avmm.config import Checked
from avmm.errors import HostError
from avmm.native import ffi, lib
from avmm.virtio.device import VirtioDevice
from avmm.virtio.devtype import DeviceContext, DeviceType
from avmm.virtio.home import HomeChoice

_QUEUE_SIZE = 64


class Rng(Checked, frozen=True):
    """A source of entropy for the guest."""

    home: HomeChoice = "auto"
    id: Annotated[str | None, msgspec.Meta(description="name in logs and statistics")] = None

    device_type: ClassVar[DeviceType]


class RngDevice(VirtioDevice):
    """Fills what the driver offers, a bounded amount a turn."""

    def __init__(self, config: Rng, context: DeviceContext) -> None:
        super().__init__(RNG, context, offered=0, queue_sizes=(_QUEUE_SIZE,))
        home = context.homes.pick(config.home)
        error = ffi.new("int *")
        self._native = lib.av_rng_create(home.native, self.queues[0].ring, error)
        if not self._native:
            raise HostError("memory", op="rng", errno=error[0])
        context.stack.callback(lib.av_rng_destroy, self._native)
        self.add_lane(lib.av_rng_lane(self._native), home, self.queues, "getrandom")


async def build(config: Rng, context: DeviceContext) -> RngDevice:
    """The device; it needs nothing of the host."""
    return RngDevice(config, context)


RNG = DeviceType(
    name="rng",
    virtio_id=4,
    flag="--rng",
    summary="random bytes from the host's getrandom",
    build=build,
)
Rng.device_type = RNG
