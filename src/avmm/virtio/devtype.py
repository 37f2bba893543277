"""The record that announces a kind of device; everything said about it elsewhere comes from it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from avmm.descriptors import Opener, open_path
from avmm.errors import GuestFault
from avmm.hostnet.tap import TapOpener, open_tap
from avmm.log import GuestLog
from avmm.mem.guest import GuestMemory
from avmm.virtio.features import RING_DEFAULT, RingLayout
from avmm.virtio.home import Homes
from avmm.virtio.interrupt import Interrupts

if TYPE_CHECKING:
    from avmm.virtio.device import VirtioDevice


@dataclass(frozen=True, slots=True)
class DeviceContext:
    """What a device is built in.

    stack: closes, in reverse order, what the device opened on the host.
    on_error: called on the loop with an error that is avmm's own or the host's; it ends the VM.
    cpus: the guest's, for devices that have a queue for each.
    ring: the layout of rings that the device offers.
    on_fault, on_ready: called on the loop with the id when the guest broke the specification, and
    when its driver has set the device up or left it; only to be told. on_link: so when a NIC's
    cable was plugged in or out.
    guest_log: for whatever a guest can make a device say. opener, open_tap: of its files and TAPs.
    """

    id: str
    memory: GuestMemory
    interrupts: Interrupts
    homes: Homes
    loop: asyncio.AbstractEventLoop
    stack: AsyncExitStack
    on_error: Callable[[BaseException], None]
    cpus: int = 1
    ring: RingLayout = RING_DEFAULT
    on_fault: Callable[[str, GuestFault], None] = lambda id, fault: None
    on_ready: Callable[[str, bool], None] = lambda id, ready: None
    on_link: Callable[[str, bool], None] = lambda id, up: None
    guest_log: GuestLog = field(default_factory=GuestLog)
    opener: Opener = open_path
    open_tap: TapOpener = open_tap


@dataclass(frozen=True, slots=True)
class DeviceType:
    """name: file, metric prefix and id prefix. virtio_id: virtio 1.3 chapter 5. flag: of the
    command line. summary: one line of the device table. build: makes the device on the loop.
    pci_class: base class, subclass and interface on the PCI transport."""

    name: str
    virtio_id: int
    flag: str
    summary: str
    build: Callable[[Any, DeviceContext], Awaitable[VirtioDevice]]
    pci_class: int = 0xFF_0000
