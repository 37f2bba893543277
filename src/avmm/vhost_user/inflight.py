"""Memory that outlives this process: what the rings had in flight when it died.

We make the file, the front-end keeps it and gives it to whoever serves it next. Each ring has its
part, which native/vring_inflight.c reads and writes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from dataclasses import replace

from avmm.errors import GuestFault, HostError
from avmm.native import CData, ffi, lib
from avmm.units import align_up
from avmm.vhost_user.memory import FrontEndMemory
from avmm.vhost_user.message import InflightMemory

_ALIGNMENT_BYTES = 64
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def create(wanted: InflightMemory) -> tuple[InflightMemory, int]:
    """New memory for that many rings of that size, with nothing in flight; the descriptor is the
    caller's. Raises HostError("memory")."""
    size_bytes = wanted.queues * _part_bytes(wanted.queue_size)
    try:
        fd = os.memfd_create("avmm-inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as e:
        raise HostError("memory", op="Memory for what is in flight", errno=e.errno) from e
    return replace(wanted, size_bytes=size_bytes, offset_bytes=0), fd


class Inflight:
    """The memory, mapped. close() only while no ring runs.

    Raises GuestFault("front-end") or HostError("memory").
    """

    def __init__(self, memory: FrontEndMemory, where: InflightMemory, fd: int) -> None:
        self._part_bytes = _part_bytes(where.queue_size)
        if where.size_bytes < where.queues * self._part_bytes:
            raise GuestFault(
                "front-end",
                f"{where.size_bytes} bytes for what {where.queues} rings have in flight",
            )
        self._where = where
        self._map, start = memory.map("In flight", fd, where.size_bytes, where.offset_bytes)
        self._view = memoryview(self._map)[start : start + where.size_bytes]
        self._buffer = ffi.from_buffer("uint8_t[]", self._view)

    def part(self, index: int, size: int) -> CData:
        """Of a ring of `size`. Raises GuestFault("front-end") when there is none that large."""
        if index >= self._where.queues or size > self._where.queue_size:
            raise GuestFault("front-end", f"Ring {index} of {size} has no memory for its flight")
        return self._buffer + index * self._part_bytes

    def close(self) -> None:
        """Unmap. Idempotent."""
        ffi.release(self._buffer)
        self._view.release()
        with contextlib.suppress(BufferError):
            self._map.close()


def _part_bytes(queue_size: int) -> int:
    return align_up(int(lib.av_vring_inflight_bytes(queue_size)), _ALIGNMENT_BYTES)
