"""What becomes of a kind of device behind vhost-user, where the front-end does part of the work."""

from __future__ import annotations

from dataclasses import dataclass

from avmm.vhost_user.message import ProtocolFeature
from avmm.virtio.devices.blk import BLK
from avmm.virtio.devices.net import CONTROL_FEATURES, NET
from avmm.virtio.devtype import DeviceType


@dataclass(frozen=True, slots=True)
class Profile:
    """hidden: virtio features that are the front-end's own business. protocol: features offered.
    rings_a_queue: in what front-ends call a queue. own_rings: at the end, not for front-ends."""

    hidden: int = 0
    protocol: ProtocolFeature = (
        ProtocolFeature.MQ
        | ProtocolFeature.REPLY_ACK
        | ProtocolFeature.BACKEND_REQ
        | ProtocolFeature.CONFIG
        | ProtocolFeature.INFLIGHT_SHMFD
        | ProtocolFeature.RESET_DEVICE
    )
    rings_a_queue: int = 1
    own_rings: int = 0


# STATUS is not offered: QEMU clears the status whenever it stops the rings, be it for a pause of
# its guest, and that would take back the cache mode which the guest has chosen.
_PROFILES = {
    BLK.name: Profile(),
    # Front-ends serve the control queue and have a configuration space of their own; QEMU warns
    # of a NIC's that it is offered.
    # What a NIC had in flight its driver sends again anyway.
    NET.name: Profile(
        hidden=CONTROL_FEATURES,
        protocol=ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK | ProtocolFeature.RESET_DEVICE,
        rings_a_queue=2,
        own_rings=1,
    ),
}


def profile_of(device_type: DeviceType) -> Profile:
    """The profile of a kind of device that can be served."""
    return _PROFILES[device_type.name]
