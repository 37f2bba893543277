"""The device behind a driver in this process: the native ring, and block requests in Python."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass

from avmm.mem.guest import GuestMemory
from avmm.native import CData, ffi, lib
from avmm.virtio.interrupt import Interrupt

_HEADER = struct.Struct("<IIQ")


@dataclass(frozen=True, slots=True)
class Popped:
    """A chain's head, the bytes the device may read, and the rooms it may write."""

    head: int
    readable: bytes
    writable: list[memoryview]


class DeviceRing:
    """The device's side of a ring at the places of a driver's setup."""

    def __init__(self, memory: GuestMemory, setup: CData) -> None:
        self.interrupt = Interrupt(setup.call_fd)
        self.native = lib.av_vring_create(memory.native, self.interrupt.native)
        own = ffi.new("struct av_vring_setup *")
        own.desc_gpa, own.driver_gpa, own.device_gpa = (
            setup.desc_gpa,
            setup.driver_gpa,
            setup.device_gpa,
        )
        own.features, own.size = setup.features, setup.size
        assert lib.av_vring_start(self.native, own) == 0
        self.kick_fd = setup.kick_fd
        self._chain = ffi.new("struct av_chain *")
        self._iov = ffi.new("struct iovec[64]")

    def pop(self) -> Popped | None:
        taken = lib.av_vring_pop(self.native, self._chain, self._iov, 64)
        assert taken >= 0, ffi.string(lib.av_fault_name(lib.av_vring_fault(self.native)))
        if not taken:
            return None
        chain = self._chain
        parts = [
            memoryview(ffi.buffer(chain.iov[i].iov_base, chain.iov[i].iov_len))
            for i in range(chain.readable + chain.writable)
        ]
        readable = b"".join(bytes(part) for part in parts[: chain.readable])
        return Popped(chain.head, readable, parts[chain.readable :])

    def push(self, head: int, written_bytes: int) -> None:
        lib.av_vring_push(self.native, head, written_bytes)

    def flush(self) -> None:
        lib.av_vring_flush(self.native)

    def close(self) -> None:
        lib.av_vring_destroy(self.native)
        self.interrupt.close()


def serve_blk(ring: DeviceRing, disk: bytearray, done: Callable[[], bool]) -> None:
    """Answer read and write requests until `done`, sleeping on the kick."""
    while not done():
        while (request := ring.pop()) is not None:
            kind, _, sector = _HEADER.unpack_from(request.readable)
            status = request.writable[-1]
            written = 1
            if kind == 1:
                data = request.readable[_HEADER.size :]
                disk[512 * sector : 512 * sector + len(data)] = data
            else:
                room = request.writable[0]
                room[:] = disk[512 * sector : 512 * sector + len(room)]
                written += len(room)
            status[0] = 0
            ring.push(request.head, written)
        ring.flush()
        if not lib.av_vring_kicks_on(ring.native):
            os.eventfd_read(ring.kick_fd)
            lib.av_vring_kicks_off(ring.native)
