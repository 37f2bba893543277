"""A NIC whose other end is in this process: Python's, or a switch's. No TAP, no privileges."""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import os
from typing import ClassVar

from avmm.config import Checked
from avmm.errors import ConfigError
from avmm.eventfd import new_eventfd
from avmm.hostnet.cable import QUEUE_DEFAULT_BYTES, CableEnd, FrameStream, make_cable
from avmm.hostnet.names import check_mtu, parse_mac, random_mac
from avmm.native import CData
from avmm.virtio.devices.net import NET, NetDevice
from avmm.virtio.devtype import DeviceContext, DeviceType
from avmm.virtio.home import HomeChoice
from avmm.virtio.limit import RateLimit
from avmm.virtio.queue import check_queue_size

_MTU_DEFAULT = 1500
_ALL_OFFLOADS = 0xF


class NicSettings(Checked, frozen=True):
    """What a Nic is made with, checked."""

    mac: str | None
    mtu: int | None
    guest: str | None
    gateway: str | None
    queue_size: int
    queue_bytes: int
    home: HomeChoice
    id: str | None
    rx_limit: RateLimit | None
    tx_limit: RateLimit | None

    def __post_init__(self) -> None:
        super().__post_init__()
        what = f"Nic {self.id or self.mac or ''}".rstrip()
        if self.mac is not None:
            parse_mac(self.mac, what)
        if self.mtu is not None:
            check_mtu(self.mtu, what)
        _check_address(self.guest, self.gateway, what)
        check_queue_size(self.queue_size, what)


class Nic(FrameStream):
    """A NIC of a guest, and its cable's other end as an asyncio object:

        nic = avmm.Nic()
        async with avmm.MicroVM(avmm.Config(kernel="vmlinux", nets=[nic])):
            async for frame in nic:
                await nic.send(answer(frame))

    An entry of `Config.nets`, of one running microVM at a time; when that has ended, iterations
    end, and the next may have the NIC. Or it is attached to a `Switch`, which then has the frames.

    mac: the guest's address; one at random by default. mtu: told to the guest. guest, gateway: its
    IPv4 address with the prefix, like 10.0.0.2/24, and its router, given to it by the kernel's
    ip=. queue_size: packets that a ring holds. queue_bytes: of frames that wait in each direction,
    see FrameStream. home: where its queues are served. id: its name in logs and statistics.
    rx_limit, tx_limit: rate limits of what the guest receives and sends. Raises ConfigError.
    """

    device_type: ClassVar[DeviceType]
    vhost: ClassVar[bool] = False
    """Frames never come to the kernel."""

    def __init__(
        self,
        mac: str | None = None,
        *,
        mtu: int | None = None,
        guest: str | None = None,
        gateway: str | None = None,
        queue_size: int = 256,
        queue_bytes: int = QUEUE_DEFAULT_BYTES,
        home: HomeChoice = "auto",
        id: str | None = None,
        rx_limit: RateLimit | None = None,
        tx_limit: RateLimit | None = None,
    ) -> None:
        NicSettings(
            *(mac, mtu, guest, gateway, queue_size, queue_bytes, home, id, rx_limit, tx_limit)
        )
        self.mac = mac or random_mac()
        self.mtu = mtu
        self.guest = guest
        self.gateway = gateway
        self.queue_size = queue_size
        self.home: HomeChoice = home
        self.id = id
        self.rx_limit = rx_limit
        self.tx_limit = tx_limit
        self._guest_end, end = make_cable(queue_bytes)
        super().__init__(end, f"Nic {id or self.mac}")
        end.set_up(True)
        self._plug: NicPlug | None = None
        self._was_plugged = False
        self._link_up = True
        self._switch: str | None = None

    def __repr__(self) -> str:
        return f"<{self._name}>"

    @property
    def link_up(self) -> bool:
        """Whether the cable is in."""
        return self._link_up

    def set_link(self, up: bool) -> None:
        """Plug the cable in or out: the guest's driver sees it at once, and while it is out,
        frames are lost. Stays so from one microVM to the next. Any thread."""
        self._link_up = up
        if self._plug is not None:
            self._plug.tell_link(up)

    # What follows is for switches and devices.

    def take_end(self, switch: str) -> CableEnd:
        """Give Python's end to a switch. Raises ConfigError("nic-busy")."""
        self._check()
        self._forget_frames()
        self._switch = switch
        return self._end

    def give_back_end(self) -> None:
        """Undo take_end()."""
        self._switch = None
        self._forget_frames()

    def plug_in(self, loop: asyncio.AbstractEventLoop) -> NicPlug:
        """The guest's end, for a device. Raises ConfigError("nic-busy")."""
        if self._plug is not None:
            raise ConfigError("nic-busy", f"{self._name}: it is in use by another microVM")
        self._plug = NicPlug(self, self._guest_end, loop)
        self._was_plugged = True
        return self._plug

    def pull_out(self) -> None:
        """Undo plug_in()."""
        self._plug = None
        self._no_longer_kept()

    def note_link(self, up: bool) -> None:
        """The device's cable was plugged in or out by its microVM."""
        self._link_up = up

    def _forget_frames(self) -> None:
        self._received.clear()
        self._end.set_up(False)
        self._end.set_up(True)

    def _is_over(self) -> bool:
        return self._was_plugged and self._plug is None

    def _keeps_waker(self) -> bool:
        return self._plug is not None

    def _check(self) -> None:
        if self._switch is not None:
            raise ConfigError(
                "nic-busy", f"{self._name}: it is attached to {self._switch}, which has its frames"
            )


class NicPlug:
    """The guest's end of a cable, as a network device's HostLink. Owns the eventfd in `fds`. Its
    machine's loop, but for tell_link()."""

    uso = False

    def __init__(self, nic: Nic, end: CableEnd, loop: asyncio.AbstractEventLoop) -> None:
        self.name = f"Nic {nic.id or nic.mac}"
        self.mtu = nic.mtu or _MTU_DEFAULT
        self.fds = [new_eventfd()]
        self.end: CData = end.native
        self.device: NetDevice | None = None
        self._nic = nic
        self._end = end
        self._loop = loop
        self._carrier = nic.link_up
        self._driven = False
        end.watch(self.fds[0])

    def set_offload(self, flags: int) -> None:
        """What the driver takes of frames that are not complete."""
        self._end.set_offloads(flags & _ALL_OFFLOADS)

    def set_queues(self, attached: object) -> None:
        """Nothing: there is one."""

    def set_carrier(self, up: bool) -> None:
        """Frames pass, or are lost."""
        self._carrier = up
        self._nic.note_link(up)
        self._update()

    def set_driver(self, present: bool) -> None:
        """Without one frames are lost."""
        self._driven = present
        self._update()

    def tell_link(self, up: bool) -> None:
        """Let the device know of its cable; any thread."""
        try:
            here = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            here = False
        if here:
            self._set_link(up)
        else:
            self._loop.call_soon_threadsafe(self._set_link, up)

    def close(self) -> None:
        """Leave the cable. Idempotent."""
        if self.fds:
            self.device = None
            self._end.set_up(False)
            self._end.watch(-1)
            os.close(self.fds.pop())
            self._nic.pull_out()

    def _set_link(self, up: bool) -> None:
        if self.device is not None:
            self.device.set_link(up)

    def _update(self) -> None:
        self._end.set_up(self._carrier and self._driven)


def _check_address(guest: str | None, gateway: str | None, what: str) -> None:
    if guest is None and gateway is None:
        return
    try:
        if guest is None or "/" not in guest:
            raise ValueError(f"guest={guest} is not an address with its prefix")
        network = ipaddress.IPv4Interface(guest).network
        if gateway is not None and ipaddress.IPv4Address(gateway) not in network:
            raise ValueError(f"gateway={gateway} is not an address of {network}")
    except ValueError as e:
        raise ConfigError(
            "address", f"{what}: {e}; write for example guest=10.0.0.2/24, gateway=10.0.0.1"
        ) from None


async def build(config: Nic, context: DeviceContext) -> NetDevice:
    """Plug the NIC in. Raises ConfigError("nic-busy"), HostError."""
    plug = config.plug_in(context.loop)
    context.stack.callback(plug.close)
    device = NetDevice(config, plug, context)
    plug.device = device
    if not config.link_up:
        device.set_link(False)
    return device


Nic.device_type = dataclasses.replace(
    NET, summary="a NIC whose other end is in this process", build=build
)
