"""The kernel's vhost-net: a kernel thread that moves packets between rings and a TAP."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from avmm.errors import HostError

VHOST_NET_PATH = "/dev/vhost-net"
NO_FD = -1

GET_FEATURES = 0x8008AF00
SET_FEATURES = 0x4008AF00
SET_OWNER = 0xAF01
SET_MEM_TABLE = 0x4008AF03
SET_VRING_NUM = 0x4008AF10
SET_VRING_ADDR = 0x4028AF11
SET_VRING_BASE = 0x4008AF12
GET_VRING_BASE = 0xC008AF12
SET_VRING_KICK = 0x4008AF20
SET_VRING_CALL = 0x4008AF21
SET_VRING_ERR = 0x4008AF22
NET_SET_BACKEND = 0x4008AF30

_U64 = struct.Struct("=Q")
_MEMORY_HEAD = struct.Struct("=II")
_MEMORY_REGION = struct.Struct("=QQQQ")
_VRING_STATE = struct.Struct("=II")
_VRING_FILE = struct.Struct("=Ii")
_VRING_ADDR = struct.Struct("=IIQQQQ")


@dataclass(frozen=True, slots=True)
class VhostRing:
    """A ring as the kernel gets it. The parts are addresses in this process; base: the available
    index to begin at. error_fd: an eventfd that is written when the driver broke the ring."""

    size: int
    desc_hva: int
    driver_hva: int
    device_hva: int
    base: int
    kick_fd: int
    call_fd: int
    error_fd: int


class VhostNet:
    """One open /dev/vhost-net: a receive ring (0) and a transmit ring (1). Loop; each call is
    short, and so is the wait for the kernel's thread in stop(). Raises HostError("vhost").

    The kernel ends its thread with the descriptor, whatever ends this process.
    """

    def __init__(self, path: str = VHOST_NET_PATH) -> None:
        self._path = path
        self._fd = _open(path)
        try:
            self._call("VHOST_SET_OWNER", SET_OWNER)
            answer = self._call("VHOST_GET_FEATURES", GET_FEATURES, bytes(_U64.size))
        except BaseException:
            self.close()
            raise
        self.features: int = _U64.unpack(answer)[0]

    def set_features(self, bits: int) -> None:
        """Those that the driver and the kernel agreed upon; no ring may run."""
        self._call("VHOST_SET_FEATURES", SET_FEATURES, _U64.pack(bits))

    def set_memory(self, regions: Sequence[tuple[int, int, int]]) -> None:
        """(gpa, size in bytes, hva) of each region of the guest's memory."""
        table = _MEMORY_HEAD.pack(len(regions), 0)
        for gpa, size_bytes, hva in regions:
            table += _MEMORY_REGION.pack(gpa, size_bytes, hva, 0)
        self._call("VHOST_SET_MEM_TABLE", SET_MEM_TABLE, table)

    def start(self, index: int, ring: VhostRing, tap_fd: int) -> None:
        """Let the kernel serve a ring, until stop()."""
        state = _VRING_STATE
        self._call("VHOST_SET_VRING_NUM", SET_VRING_NUM, state.pack(index, ring.size))
        self._call("VHOST_SET_VRING_BASE", SET_VRING_BASE, state.pack(index, ring.base))
        addresses = (ring.desc_hva, ring.device_hva, ring.driver_hva, 0)
        self._call("VHOST_SET_VRING_ADDR", SET_VRING_ADDR, _VRING_ADDR.pack(index, 0, *addresses))
        for op, request, fd in (
            ("VHOST_SET_VRING_ERR", SET_VRING_ERR, ring.error_fd),
            ("VHOST_SET_VRING_CALL", SET_VRING_CALL, ring.call_fd),
            ("VHOST_SET_VRING_KICK", SET_VRING_KICK, ring.kick_fd),
            ("VHOST_NET_SET_BACKEND", NET_SET_BACKEND, tap_fd),
        ):
            self._call(op, request, _VRING_FILE.pack(index, fd))

    def set_call(self, index: int, fd: int) -> None:
        """The eventfd by which the driver is interrupted, or NO_FD; any time."""
        self._call("VHOST_SET_VRING_CALL", SET_VRING_CALL, _VRING_FILE.pack(index, fd))

    def stop(self, index: int) -> int:
        """Take a ring back; the available index at which it can be started again."""
        backend = _VRING_FILE.pack(index, NO_FD)
        self._call("VHOST_NET_SET_BACKEND", NET_SET_BACKEND, backend)
        answer = self._call("VHOST_GET_VRING_BASE", GET_VRING_BASE, _VRING_STATE.pack(index, 0))
        base: int = _VRING_STATE.unpack(answer)[1]
        return base

    def close(self) -> None:
        """End the kernel's thread. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _call(self, op: str, request: int, argument: bytes = b"") -> bytes:
        buffer = bytearray(argument)
        try:
            if buffer:
                fcntl.ioctl(self._fd, request, buffer, True)
            else:
                fcntl.ioctl(self._fd, request)
        except OSError as e:
            raise HostError("vhost", op=op, path=self._path, errno=e.errno) from e
        return bytes(buffer)


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as e:
        remedy = "load the module: modprobe vhost_net"
        if e.errno in (errno.EACCES, errno.EPERM):
            remedy = "run as root, or make it accessible to your user"
        raise HostError("vhost", op="open", path=path, errno=e.errno, remedy=remedy) from e
