"""A queue that carries plain bytes one way, served by Python: the copies are native."""

from __future__ import annotations

from avmm.errors import GuestFault, HostError
from avmm.native import CData, ffi, lib
from avmm.units import KIB
from avmm.virtio.devtype import DeviceContext
from avmm.virtio.queue import Queue

TAKE_BYTES = 64 * KIB
"""Taken in one piece, at most."""


class ByteQueue:
    """One direction. Loop. context: its stack frees it."""

    def __init__(self, queue: Queue, context: DeviceContext) -> None:
        self.queue = queue
        self.count_bytes = 0
        self._native: CData = lib.av_stream_create(queue.ring)
        if not self._native:
            raise HostError("memory", op="Byte queue", errno=ffi.errno)
        context.stack.callback(lib.av_stream_destroy, self._native)
        self._count = ffi.new("uint32_t *")
        self._room: CData = ffi.NULL

    def take_kick(self) -> None:
        """The queue's kick_fd was readable."""
        self.queue.take_kick()
        lib.av_vring_count_kick(self.queue.ring)

    def take(self) -> tuple[bytes, bool]:
        """What the driver sent, up to 64 KiB, and whether there may be more. It is not asked to
        kick for what is left behind. Raises GuestFault."""
        if not self._room:
            self._room = ffi.new("uint8_t[]", TAKE_BYTES)
        result = lib.av_stream_take(self._native, self._room, TAKE_BYTES, self._count)
        count = int(self._count[0])
        if result < 0 and not count:  # with bytes, the next call says so again
            raise self._fault()
        self.count_bytes += count
        return bytes(ffi.buffer(self._room, count)), result != 0

    def put(self, data: memoryview) -> int:
        """Give the driver bytes; how many fit into the buffers that it offers. When that is fewer
        it kicks when it offers more. Raises GuestFault."""
        piece = data[:TAKE_BYTES]
        total = 0
        while piece:
            source = ffi.from_buffer(piece)
            result = lib.av_stream_put(self._native, source, len(piece), self._count)
            count = int(self._count[0])
            self.count_bytes += count
            total += count
            if result < 0:
                raise self._fault()
            if result > 0:
                break
            piece = data[total : total + TAKE_BYTES]
        return total

    def forget(self) -> None:
        """The queue stops."""
        lib.av_stream_forget(self._native)

    def _fault(self) -> GuestFault:
        kind = self.queue.fault
        return GuestFault(kind, f"Queue {self.queue.index}: {kind}")
