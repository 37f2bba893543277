"""TAP devices: made or taken over, configured, and gone with their descriptor."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from dataclasses import dataclass

from avmm.errors import ConfigError, HostError
from avmm.hostnet.names import parse_host
from avmm.hostnet.netlink import Netlink, with_netlink

TUN_PATH = "/dev/net/tun"
VNET_HEADER_BYTES = 12
"""struct virtio_net_hdr_v1, with num_buffers (virtio 1.3 section 5.1.6)."""

OFFLOAD_CSUM = 1 << 0
OFFLOAD_TSO4 = 1 << 1
OFFLOAD_TSO6 = 1 << 2
OFFLOAD_TSO_ECN = 1 << 3

_TUNSETIFF = 0x400454CA
_TUNSETPERSIST = 0x400454CB
_TUNSETOFFLOAD = 0x400454D0
_TUNSETVNETHDRSZ = 0x400454D8
_TUNSETCARRIER = 0x400454E2
_IFF_TAP = 0x0002
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
    """What is asked for. host: an address with its prefix; None leaves addresses alone."""

    name: str
    host: str | None = None
    mtu: int | None = None


class HostTap:
    """An attached TAP. Owns its descriptor, non-blocking. mtu: as it was when attached.

    created: made by us. Such a TAP is not persistent, so it goes with the descriptor whatever
    ends the process. One that was there before stays, without the address we added.
    """

    def __init__(
        self, settings: TapSettings, fd: int, *, created: bool, added: bool, mtu: int
    ) -> None:
        self.name = settings.name
        self.fd = fd
        self.mtu = mtu
        self.created = created
        self._settings = settings
        self._added_address = added

    def set_offload(self, flags: int) -> None:
        """OFFLOAD_* that the kernel may use in packets for the guest."""
        try:
            fcntl.ioctl(self.fd, _TUNSETOFFLOAD, flags)
        except OSError as e:
            raise HostError("tap", op="TUNSETOFFLOAD", path=self.name, errno=e.errno) from e

    def set_carrier(self, up: bool) -> None:
        """Whether the host's interface has a carrier; without one nothing is routed to it."""
        try:
            fcntl.ioctl(self.fd, _TUNSETCARRIER, int(up).to_bytes(4, "little"))
        except OSError as e:
            raise HostError("tap", op="TUNSETCARRIER", path=self.name, errno=e.errno) from e

    async def close(self) -> None:
        """Detach and undo. Idempotent."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        if self._added_address and not self.created:
            await with_netlink(self.remove_address)

    def remove_address(self, netlink: Netlink) -> None:
        """Take back the address that was added to a TAP not made by us."""
        if self.created or not self._added_address or self._settings.host is None:
            return
        host = parse_host(self._settings.host, self.name)
        index = netlink.index(self.name)
        if index is not None:  # else somebody removed the TAP, and the address with it
            netlink.remove_address(index, self.name, str(host.ip), host.network.prefixlen)


async def open_tap(settings: TapSettings) -> HostTap:
    """Make the TAP, or attach to one that exists, and configure it.

    Raises ConfigError("tap-busy") or HostError, and then nothing is left behind.
    """
    return await with_netlink(lambda netlink: _open(netlink, settings), _undo)


def _undo(netlink: Netlink, tap: HostTap) -> None:
    os.close(tap.fd)
    tap.fd = -1
    tap.remove_address(netlink)


def _open(netlink: Netlink, settings: TapSettings) -> HostTap:
    name = settings.name
    fd = _open_tun()
    created = False
    try:
        if netlink.index(name) is None:
            netlink.add_tap(name)
            created = True
        _attach(fd, name)
        if created:
            # From here on the kernel removes it with the descriptor, even after SIGKILL.
            fcntl.ioctl(fd, _TUNSETPERSIST, 0)
        fcntl.ioctl(fd, _TUNSETVNETHDRSZ, VNET_HEADER_BYTES.to_bytes(4, "little"))
        added, mtu = _configure(netlink, settings)
    except BaseException as e:
        os.close(fd)
        index = netlink.index(name) if created else None
        if index is not None:
            netlink.delete(index, name)
        if isinstance(e, OSError):
            raise HostError("tap", op="ioctl", path=name, errno=e.errno) from e
        raise
    return HostTap(settings, fd, created=created, added=added, mtu=mtu)


def _open_tun() -> int:
    try:
        return os.open(TUN_PATH, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as e:
        remedy = "load the module: modprobe tun"
        if e.errno in (errno.EACCES, errno.EPERM):
            remedy = "run as root, or make it accessible to your user"
        raise HostError("tun", op="open", path=TUN_PATH, errno=e.errno, remedy=remedy) from e


def _attach(fd: int, name: str) -> None:
    request = bytearray(_IFREQ.pack(name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
    try:
        fcntl.ioctl(fd, _TUNSETIFF, request)
    except OSError as e:
        remedy = _ATTACH_REMEDIES.get(e.errno or 0)
        if e.errno in (errno.EBUSY, errno.EINVAL):
            raise ConfigError("tap-busy", f"TAP {name}: {remedy}; choose another name") from e
        raise HostError("tap", op="TUNSETIFF", path=name, errno=e.errno, remedy=remedy) from e


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
    return added, netlink.mtu(index)
