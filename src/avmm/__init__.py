"""avmm: an asyncio microVM monitor on Linux KVM.

Names are loaded when they are first used, so importing avmm costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from avmm.agent.client import Agent
    from avmm.agent.process import Process
    from avmm.agent.protocol import FileEntry, FileStat
    from avmm.console.console import Console
    from avmm.console.server import ConsoleServer
    from avmm.errors import AvmmError, BugError, ConfigError, GuestFault, HostError, SnapshotError
    from avmm.hostnet.cable import LinkStatistics
    from avmm.hostnet.fabric import CaptureStatistics, Link, PortStatistics, SwitchStatistics
    from avmm.hostnet.switch import Capture, Port, Switch, SwitchPort
    from avmm.legacy.serial16550 import SerialStatistics
    from avmm.machine.config import Config
    from avmm.machine.events import (
        ConsoleClosed,
        DeviceFault,
        DriverGone,
        DriverReady,
        Ended,
        Event,
        Events,
        EventsLost,
        LinkChanged,
        Paused,
        Resumed,
        Started,
        StopRequested,
    )
    from avmm.machine.lifecycle import State
    from avmm.machine.machine import MicroVM
    from avmm.machine.reason import ExitKind, ExitReason
    from avmm.machine.statistics import MachineStatistics
    from avmm.machine.vcpu.thread import VcpuStatistics
    from avmm.vhost_user.server import ServerStatistics, VhostUserServer
    from avmm.virtio.device import DeviceStatistics
    from avmm.virtio.devices.blk import Disk
    from avmm.virtio.devices.blk_source import AsyncDisk
    from avmm.virtio.devices.console import VirtioConsole
    from avmm.virtio.devices.net import Tap
    from avmm.virtio.devices.nic import Nic
    from avmm.virtio.devices.port import GuestPort
    from avmm.virtio.devices.ports import Ports
    from avmm.virtio.devices.rng import Rng
    from avmm.virtio.devices.vsock import Vsock
    from avmm.virtio.home import HomeStatistics
    from avmm.virtio.limit import RateLimit
    from avmm.virtio.python_device import Chain, PythonDevice
    from avmm.virtio.queue import QueueStatistics

_HOMES = {
    "Agent": "avmm.agent.client",
    "FileEntry": "avmm.agent.protocol",
    "FileStat": "avmm.agent.protocol",
    "Process": "avmm.agent.process",
    "AsyncDisk": "avmm.virtio.devices.blk_source",
    "AvmmError": "avmm.errors",
    "BugError": "avmm.errors",
    "Capture": "avmm.hostnet.switch",
    "CaptureStatistics": "avmm.hostnet.fabric",
    "Chain": "avmm.virtio.python_device",
    "Config": "avmm.machine.config",
    "ConfigError": "avmm.errors",
    "Console": "avmm.console.console",
    "ConsoleServer": "avmm.console.server",
    "ConsoleClosed": "avmm.machine.events",
    "DeviceFault": "avmm.machine.events",
    "DeviceStatistics": "avmm.virtio.device",
    "Disk": "avmm.virtio.devices.blk",
    "DriverGone": "avmm.machine.events",
    "DriverReady": "avmm.machine.events",
    "Ended": "avmm.machine.events",
    "Event": "avmm.machine.events",
    "Events": "avmm.machine.events",
    "EventsLost": "avmm.machine.events",
    "ExitKind": "avmm.machine.reason",
    "ExitReason": "avmm.machine.reason",
    "GuestFault": "avmm.errors",
    "GuestPort": "avmm.virtio.devices.port",
    "HomeStatistics": "avmm.virtio.home",
    "HostError": "avmm.errors",
    "Link": "avmm.hostnet.fabric",
    "LinkChanged": "avmm.machine.events",
    "LinkStatistics": "avmm.hostnet.cable",
    "MachineStatistics": "avmm.machine.statistics",
    "MicroVM": "avmm.machine.machine",
    "Nic": "avmm.virtio.devices.nic",
    "Paused": "avmm.machine.events",
    "Port": "avmm.hostnet.switch",
    "Ports": "avmm.virtio.devices.ports",
    "PortStatistics": "avmm.hostnet.fabric",
    "PythonDevice": "avmm.virtio.python_device",
    "QueueStatistics": "avmm.virtio.queue",
    "RateLimit": "avmm.virtio.limit",
    "Resumed": "avmm.machine.events",
    "Rng": "avmm.virtio.devices.rng",
    "SerialStatistics": "avmm.legacy.serial16550",
    "ServerStatistics": "avmm.vhost_user.server",
    "SnapshotError": "avmm.errors",
    "Started": "avmm.machine.events",
    "State": "avmm.machine.lifecycle",
    "StopRequested": "avmm.machine.events",
    "Switch": "avmm.hostnet.switch",
    "SwitchPort": "avmm.hostnet.switch",
    "SwitchStatistics": "avmm.hostnet.fabric",
    "Tap": "avmm.virtio.devices.net",
    "VcpuStatistics": "avmm.machine.vcpu.thread",
    "VhostUserServer": "avmm.vhost_user.server",
    "VirtioConsole": "avmm.virtio.devices.console",
    "Vsock": "avmm.virtio.devices.vsock",
}

__all__ = [
    "Agent",
    "AsyncDisk",
    "AvmmError",
    "BugError",
    "Capture",
    "CaptureStatistics",
    "Chain",
    "Config",
    "ConfigError",
    "Console",
    "ConsoleClosed",
    "ConsoleServer",
    "DeviceFault",
    "DeviceStatistics",
    "Disk",
    "DriverGone",
    "DriverReady",
    "Ended",
    "Event",
    "Events",
    "EventsLost",
    "ExitKind",
    "ExitReason",
    "FileEntry",
    "FileStat",
    "GuestFault",
    "GuestPort",
    "HomeStatistics",
    "HostError",
    "Link",
    "LinkChanged",
    "LinkStatistics",
    "MachineStatistics",
    "MicroVM",
    "Nic",
    "Paused",
    "Port",
    "PortStatistics",
    "Ports",
    "Process",
    "PythonDevice",
    "QueueStatistics",
    "RateLimit",
    "Resumed",
    "Rng",
    "SerialStatistics",
    "ServerStatistics",
    "SnapshotError",
    "Started",
    "State",
    "StopRequested",
    "Switch",
    "SwitchPort",
    "SwitchStatistics",
    "Tap",
    "VcpuStatistics",
    "VhostUserServer",
    "VirtioConsole",
    "Vsock",
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
