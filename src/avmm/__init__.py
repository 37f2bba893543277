"""avmm: an asyncio microVM monitor on Linux KVM.

Names are loaded when they are first used, so importing avmm costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from avmm.errors import (
        AvmmError,
        BugError,
        ConfigError,
        GuestFault,
        HostError,
        SnapshotError,
    )
    from avmm.machine.config import Config
    from avmm.machine.lifecycle import State
    from avmm.machine.machine import MachineStatistics, MicroVM
    from avmm.machine.reason import ExitKind, ExitReason
    from avmm.vhost_user.server import ServerStatistics, VhostUserServer
    from avmm.virtio.devices.blk import Disk
    from avmm.virtio.devices.net import Tap
    from avmm.virtio.devices.rng import Rng

_HOMES = {
    "AvmmError": "avmm.errors",
    "BugError": "avmm.errors",
    "Config": "avmm.machine.config",
    "ConfigError": "avmm.errors",
    "Disk": "avmm.virtio.devices.blk",
    "ExitKind": "avmm.machine.reason",
    "ExitReason": "avmm.machine.reason",
    "GuestFault": "avmm.errors",
    "HostError": "avmm.errors",
    "MachineStatistics": "avmm.machine.machine",
    "MicroVM": "avmm.machine.machine",
    "Rng": "avmm.virtio.devices.rng",
    "ServerStatistics": "avmm.vhost_user.server",
    "SnapshotError": "avmm.errors",
    "State": "avmm.machine.lifecycle",
    "Tap": "avmm.virtio.devices.net",
    "VhostUserServer": "avmm.vhost_user.server",
}

__all__ = [
    "AvmmError",
    "BugError",
    "Config",
    "ConfigError",
    "Disk",
    "ExitKind",
    "ExitReason",
    "GuestFault",
    "HostError",
    "MachineStatistics",
    "MicroVM",
    "Rng",
    "ServerStatistics",
    "SnapshotError",
    "State",
    "Tap",
    "VhostUserServer",
    "__version__",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'avmm' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
