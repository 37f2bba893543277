"""The ioctls of vhost-net, as the kernel would get them."""

from __future__ import annotations

import errno
import fcntl
import struct
from dataclasses import dataclass, field

import pytest

from avmm.errors import HostError
from avmm.hostnet import vhost
from avmm.hostnet.vhost import VhostNet, VhostRing

FEATURES = 1 << 32 | 1 << 29 | 1 << 28 | 1 << 15


@dataclass
class Kernel:
    """calls: (request, argument) of each ioctl. refuse: answered with EFAULT."""

    calls: list[tuple[int, bytes]] = field(default_factory=list)
    refuse: int | None = None

    def ioctl(self, fd: int, request: int, argument: bytearray | int = 0, _: bool = True) -> int:
        data = bytes(argument) if isinstance(argument, bytearray) else b""
        self.calls.append((request, data))
        if request == self.refuse:
            raise OSError(errno.EFAULT, "injected")
        if isinstance(argument, bytearray) and request == vhost.GET_FEATURES:
            argument[:] = struct.pack("=Q", FEATURES)
        if isinstance(argument, bytearray) and request == vhost.GET_VRING_BASE:
            argument[4:] = struct.pack("=I", 77)
        return 0


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    monkeypatch.setattr(fcntl, "ioctl", kernel.ioctl)
    return kernel


def request(direction: int, number: int, size: int) -> int:
    """The kernel's _IO, _IOW (1), _IOR (2) and _IOWR (3) for vhost's letter."""
    return direction << 30 | size << 16 | 0xAF << 8 | number


def test_the_requests_are_numbered_as_the_kernel_numbers_them() -> None:
    assert request(0, 0x01, 0) == vhost.SET_OWNER
    assert request(2, 0x00, 8) == vhost.GET_FEATURES
    assert request(1, 0x00, 8) == vhost.SET_FEATURES
    assert request(1, 0x03, 8) == vhost.SET_MEM_TABLE
    assert request(1, 0x10, 8) == vhost.SET_VRING_NUM
    assert request(1, 0x11, 40) == vhost.SET_VRING_ADDR
    assert request(1, 0x12, 8) == vhost.SET_VRING_BASE
    assert request(3, 0x12, 8) == vhost.GET_VRING_BASE
    assert request(1, 0x20, 8) == vhost.SET_VRING_KICK
    assert request(1, 0x21, 8) == vhost.SET_VRING_CALL
    assert request(1, 0x22, 8) == vhost.SET_VRING_ERR
    assert request(1, 0x30, 8) == vhost.NET_SET_BACKEND


def test_a_ring_is_described_before_the_tap_is_given(kernel: Kernel) -> None:
    net = VhostNet("/dev/null")
    assert net.features == FEATURES
    net.set_features(1 << 32)
    net.set_memory([(0, 0x1000, 0x7F00_0000_0000), (0x1_0000_0000, 0x2000, 0x7F10_0000_0000)])
    ring = VhostRing(
        size=256,
        desc_hva=0x1000,
        driver_hva=0x2000,
        device_hva=0x3000,
        base=5,
        kick_fd=10,
        call_fd=-1,
        error_fd=12,
    )
    net.start(1, ring, tap_fd=13)
    assert net.stop(1) == 77
    net.close()
    net.close()
    region = struct.Struct("=QQQQ")
    assert kernel.calls == [
        (vhost.SET_OWNER, b""),
        (vhost.GET_FEATURES, bytes(8)),
        (vhost.SET_FEATURES, struct.pack("=Q", 1 << 32)),
        (
            vhost.SET_MEM_TABLE,
            struct.pack("=II", 2, 0)
            + region.pack(0, 0x1000, 0x7F00_0000_0000, 0)
            + region.pack(0x1_0000_0000, 0x2000, 0x7F10_0000_0000, 0),
        ),
        (vhost.SET_VRING_NUM, struct.pack("=II", 1, 256)),
        (vhost.SET_VRING_BASE, struct.pack("=II", 1, 5)),
        # struct vhost_vring_addr: descriptors, used ring, available ring, log.
        (vhost.SET_VRING_ADDR, struct.pack("=IIQQQQ", 1, 0, 0x1000, 0x3000, 0x2000, 0)),
        (vhost.SET_VRING_ERR, struct.pack("=Ii", 1, 12)),
        (vhost.SET_VRING_CALL, struct.pack("=Ii", 1, -1)),
        (vhost.SET_VRING_KICK, struct.pack("=Ii", 1, 10)),
        (vhost.NET_SET_BACKEND, struct.pack("=Ii", 1, 13)),
        (vhost.NET_SET_BACKEND, struct.pack("=Ii", 1, -1)),
        (vhost.GET_VRING_BASE, struct.pack("=II", 1, 0)),
    ]


def test_what_the_kernel_refuses_is_named(kernel: Kernel) -> None:
    kernel.refuse = vhost.SET_OWNER
    with pytest.raises(HostError, match="VHOST_SET_OWNER /dev/null: Bad address"):
        VhostNet("/dev/null")


def test_without_the_module_the_remedy_is_named() -> None:
    with pytest.raises(HostError, match="modprobe vhost_net"):
        VhostNet("/dev/there-is-no-vhost-net")
