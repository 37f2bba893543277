"""TAP devices: made or taken over, configured, and gone with their descriptor."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from avmm.errors import ConfigError, HostError
from avmm.hostnet.names import parse_host
from avmm.hostnet.netlink import Netlink, with_netlink
from avmm.native import CData, ffi

TUN_PATH = "/dev/net/tun"
VNET_HEADER_BYTES = 12
"""struct virtio_net_hdr_v1, with num_buffers (virtio 1.3 section 5.1.6)."""

OFFLOAD_CSUM = 1 << 0
OFFLOAD_TSO4 = 1 << 1
OFFLOAD_TSO6 = 1 << 2
OFFLOAD_TSO_ECN = 1 << 3
OFFLOAD_USO4 = 1 << 5
OFFLOAD_USO6 = 1 << 6

_TUNSETIFF = 0x400454CA
_TUNSETPERSIST = 0x400454CB
_TUNSETOFFLOAD = 0x400454D0
_TUNSETVNETHDRSZ = 0x400454D8
_TUNSETQUEUE = 0x400454D9
_TUNSETCARRIER = 0x400454E2
_IFF_TAP = 0x0002
_IFF_MULTI_QUEUE = 0x0100
_IFF_ATTACH_QUEUE = 0x0200
_IFF_DETACH_QUEUE = 0x0400
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000
_IFREQ = struct.Struct("16sH22x")

_ATTACH_REMEDIES = {
    errno.EBUSY: "it is in use by another process or microVM",
    errno.EINVAL: "it is not a TAP, or one of another kind",
    errno.EPERM: "it belongs to another user; run as root or with CAP_NET_ADMIN",
}


@dataclass(frozen=True, slots=True)
class TapSettings:
    """What is asked for. host: an address with its prefix; None leaves addresses alone.
    queues: at most; a TAP that was made with one has no more."""

    name: str
    host: str | None = None
    mtu: int | None = None
    queues: int = 1


class HostTap:
    """An attached TAP. Owns `fds`, its queues: non-blocking, all attached at first.

    mtu: as it was when attached. uso: whether the kernel knows UDP segmentation offload.
    created: made by us. Such a TAP is not persistent, so it goes with the descriptors whatever
    ends the process. One that was there before stays, without the address we added.
    """

    def __init__(
        self,
        settings: TapSettings,
        fds: Sequence[int],
        *,
        created: bool,
        added: bool,
        mtu: int,
        uso: bool = False,
    ) -> None:
        self.name = settings.name
        self.fds = list(fds)
        self.end: CData = ffi.NULL
        self._attached = [True] * len(self.fds)
        self.mtu = mtu
        self.uso = uso
        self.created = created
        self._settings = settings
        self._added_address = added

    def set_offload(self, flags: int) -> None:
        """OFFLOAD_* that the kernel may use in packets for the guest."""
        try:
            fcntl.ioctl(self.fds[0], _TUNSETOFFLOAD, flags)
        except OSError as e:
            raise HostError("tap", op="TUNSETOFFLOAD", path=self.name, errno=e.errno) from e

    def set_driver(self, present: bool) -> None:
        """Nothing: what comes waits for the guest's driver, as long as there is room."""

    def set_queues(self, attached: Sequence[bool]) -> None:
        """Which queues the host may choose for a packet; those that are not named are not, and
        the first always is: what concerns the whole TAP is asked through it."""
        for index in range(1, len(self.fds)):
            wanted = index < len(attached) and attached[index]
            if wanted != self._attached[index]:
                self._set_queue(index, wanted)
                self._attached[index] = wanted

    def _set_queue(self, index: int, attached: bool) -> None:
        flags = _IFF_ATTACH_QUEUE if attached else _IFF_DETACH_QUEUE
        try:
            fcntl.ioctl(self.fds[index], _TUNSETQUEUE, bytearray(_IFREQ.pack(b"", flags)))
        except OSError as e:
            # A queue whose TAP is gone is neither attached nor detached.
            code = errno.EBADFD if e.errno == errno.EINVAL else e.errno
            raise HostError("tap", op="TUNSETQUEUE", path=self.name, errno=code) from e

    def set_carrier(self, up: bool) -> None:
        """Whether the host's interface has a carrier; without one nothing is routed to it."""
        try:
            fcntl.ioctl(self.fds[0], _TUNSETCARRIER, int(up).to_bytes(4, "little"))
        except OSError as e:
            raise HostError("tap", op="TUNSETCARRIER", path=self.name, errno=e.errno) from e

    async def close(self) -> None:
        """Detach and undo. Idempotent."""
        if not self.fds:
            return
        self.close_fds()
        if self._added_address and not self.created:
            await with_netlink(self.remove_address)

    def close_fds(self) -> None:
        """Detach, and no more. Idempotent."""
        while self.fds:
            os.close(self.fds.pop())

    def remove_address(self, netlink: Netlink) -> None:
        """Take back the address that was added to a TAP not made by us."""
        if self.created or not self._added_address or self._settings.host is None:
            return
        host = parse_host(self._settings.host, self.name)
        index = netlink.index(self.name)
        if index is not None:  # else somebody removed the TAP, and the address with it
            netlink.remove_address(index, self.name, str(host.ip), host.network.prefixlen)


TapOpener: TypeAlias = Callable[[TapSettings], Awaitable[HostTap]]
"""open_tap(), or what gives a TAP that was opened elsewhere."""


def handed_tap(settings: TapSettings, fds: Sequence[int], *, mtu: int, uso: bool) -> HostTap:
    """A TAP that somebody else opened and will undo; its descriptors are ours."""
    return HostTap(settings, fds, created=True, added=False, mtu=mtu, uso=uso)


async def open_tap(settings: TapSettings) -> HostTap:
    """Make the TAP, or attach to one that exists, and configure it.

    Raises ConfigError("tap-busy") or HostError, and then nothing is left behind.
    """
    return await with_netlink(lambda netlink: _open(netlink, settings), _undo)


def _undo(netlink: Netlink, tap: HostTap) -> None:
    tap.close_fds()
    tap.remove_address(netlink)


def _open(netlink: Netlink, settings: TapSettings) -> HostTap:
    name = settings.name
    fds = [_open_tun()]
    created = False
    try:
        if netlink.index(name) is None:
            netlink.add_tap(name, multi_queue=settings.queues > 1)
            created = True
        multi_queue = _attach_first(fds[0], name, settings.queues > 1)
        if created:
            # From here on the kernel removes it with the descriptors, even after SIGKILL.
            fcntl.ioctl(fds[0], _TUNSETPERSIST, 0)
        while multi_queue and len(fds) < settings.queues:
            fds.append(_open_tun())
            _attach(fds[-1], name, _IFF_MULTI_QUEUE)
        fcntl.ioctl(fds[0], _TUNSETVNETHDRSZ, VNET_HEADER_BYTES.to_bytes(4, "little"))
        uso = _knows_uso(fds[0])
        added, mtu = _configure(netlink, settings)
    except BaseException as e:
        for fd in fds:
            os.close(fd)
        index = netlink.index(name) if created else None
        if index is not None:
            netlink.delete(index, name)
        if isinstance(e, OSError):
            raise HostError("tap", op="ioctl", path=name, errno=e.errno) from e
        raise
    return HostTap(settings, fds, created=created, added=added, mtu=mtu, uso=uso)


def _open_tun() -> int:
    try:
        return os.open(TUN_PATH, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as e:
        remedy = "load the module: modprobe tun"
        if e.errno in (errno.EACCES, errno.EPERM):
            remedy = "run as root, or make it accessible to your user"
        raise HostError("tun", op="open", path=TUN_PATH, errno=e.errno, remedy=remedy) from e


def _attach_first(fd: int, name: str, multi_queue: bool) -> bool:
    """Whether the TAP has several queues; one that exists is taken as it was made."""
    for flag in (multi_queue, not multi_queue):
        try:
            _ioctl_attach(fd, name, _IFF_MULTI_QUEUE if flag else 0)
        except OSError as e:
            if e.errno != errno.EINVAL or flag != multi_queue:
                raise _attach_error(name, e) from e
        else:
            return flag
    raise AssertionError  # the second attempt returns or raises


def _attach(fd: int, name: str, flags: int) -> None:
    try:
        _ioctl_attach(fd, name, flags)
    except OSError as e:
        raise _attach_error(name, e) from e


def _ioctl_attach(fd: int, name: str, flags: int) -> None:
    flags |= _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
    fcntl.ioctl(fd, _TUNSETIFF, bytearray(_IFREQ.pack(name.encode(), flags)))


def _attach_error(name: str, e: OSError) -> ConfigError | HostError:
    remedy = _ATTACH_REMEDIES.get(e.errno or 0)
    if e.errno in (errno.EBUSY, errno.EINVAL):
        return ConfigError("tap-busy", f"TAP {name}: {remedy}; choose another name")
    return HostError("tap", op="TUNSETIFF", path=name, errno=e.errno, remedy=remedy)


def _knows_uso(fd: int) -> bool:
    """Linux 6.2 and newer do. Offloads are off again afterwards."""
    try:
        fcntl.ioctl(fd, _TUNSETOFFLOAD, OFFLOAD_CSUM | OFFLOAD_USO4 | OFFLOAD_USO6)
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
        return False
    fcntl.ioctl(fd, _TUNSETOFFLOAD, 0)
    return True


def _configure(netlink: Netlink, settings: TapSettings) -> tuple[bool, int]:
    """MTU, up, address; whether the address is ours to remove, and the MTU in force."""
    index = netlink.index(settings.name)
    if index is None:
        raise HostError(
            "tap", op="TAP", path=settings.name, remedy="it vanished while it was set up"
        )
    added = False
    if settings.host is not None:
        host = parse_host(settings.host, settings.name)
        added = netlink.add_address(index, settings.name, str(host.ip), host.network.prefixlen)
    netlink.set_up(index, settings.name, settings.mtu)
    return added, netlink.mtu(settings.name)
