"""Cables in memory, and their ends for Python: Ethernet frames as bytes, on an asyncio loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

from avmm.errors import ConfigError, HostError
from avmm.eventfd import new_eventfd
from avmm.loop import add_reader
from avmm.native import CData, ffi, lib
from avmm.units import KIB, MIB

Frame = bytes | bytearray | memoryview

FRAME_MIN_BYTES: Final = 14
FRAME_MAX_BYTES: Final = 65535 + 14 + 8
"""The largest IP packet behind two VLAN tags."""

QUEUE_DEFAULT_BYTES: Final = MIB
QUEUE_MIN_BYTES: Final = 256 * KIB
QUEUE_MAX_BYTES: Final = 1024 * MIB

_BATCH_FRAMES = 256
_BATCH_BYTES = 2 * FRAME_MAX_BYTES


@dataclass(frozen=True, slots=True)
class LinkStatistics:
    """What one end of a cable sent and received, since it was made.

    lost_down: sent while there was nobody at the other end, or no carrier. lost_full: sent, but
    the other end had no room; a guest's frames are lost so when Python does not read them.
    refused: sent by a guest with a length or header that makes no sense. segmented: large frames
    of a guest that were made into ordinary ones, since the other end does not take them.
    queued_frames, queued_bytes: waiting to be received by this end.
    """

    sent_frames: int
    sent_bytes: int
    received_frames: int
    received_bytes: int
    lost_down: int
    lost_full: int
    refused: int
    segmented: int
    queued_frames: int
    queued_bytes: int


class CableEnd:
    """One end of a cable for whoever has it: a device, a switch, Python. Any thread.

    Holds the cable in memory; the descriptor it is watched by belongs to the user.
    """

    def __init__(self, cable: CData, side: int) -> None:
        self._cable = cable  # keeps it alive
        self.native: CData = lib.av_cable_end(cable, side)

    def watch(self, event_fd: int) -> None:
        """An eventfd, written when frames came or there is room again, after there were none;
        and once now. -1: none, and the one before is not touched any more."""
        lib.av_cable_watch(self.native, event_fd)

    def set_up(self, up: bool) -> None:
        """Frames pass while both ends are up; what waits for one that goes down is lost."""
        lib.av_cable_set_up(self.native, up)

    def set_offloads(self, offloads: int) -> None:
        """OFFLOAD_* of `hostnet.tap`: what this end takes of frames that are not complete."""
        lib.av_cable_set_offloads(self.native, offloads)

    def set_patient(self, patient: bool) -> None:
        """Whether a NIC waits for room at this end; otherwise its frames are lost."""
        lib.av_cable_set_patient(self.native, patient)

    def statistics(self) -> LinkStatistics:
        """Counters as of now."""
        s = ffi.new("struct av_cable_stats *")
        lib.av_cable_statistics(self.native, s)
        return LinkStatistics(
            sent_frames=s.sent_frames,
            sent_bytes=s.sent_bytes,
            received_frames=s.taken_frames,
            received_bytes=s.taken_bytes,
            lost_down=s.lost_down,
            lost_full=s.lost_full,
            refused=s.refused,
            segmented=s.segmented,
            queued_frames=s.queued_frames,
            queued_bytes=s.queued_bytes,
        )


def make_cable(queue_bytes: int = QUEUE_DEFAULT_BYTES) -> tuple[CableEnd, CableEnd]:
    """Two ends, both down. queue_bytes: of frames that wait at each, with a few bytes for each
    frame. Memory is used as far as there are frames. Raises ConfigError, HostError."""
    if not QUEUE_MIN_BYTES <= queue_bytes <= QUEUE_MAX_BYTES:
        raise ConfigError(
            "queue",
            f"queue_bytes: {queue_bytes} is not in {QUEUE_MIN_BYTES} to {QUEUE_MAX_BYTES}",
        )
    error = ffi.new("int *")
    native = lib.av_cable_create(queue_bytes, error)
    if not native:
        raise HostError("memory", op="Cable", errno=error[0])
    cable = ffi.gc(native, lib.av_cable_destroy)
    return CableEnd(cable, 0), CableEnd(cable, 1)


class FrameStream(ABC):
    """A cable's end as an asyncio object: `async for frame in nic`, `await nic.send(frame)`.

    A frame is bytes from the destination's address on, without checksum at its end: 14 bytes at
    least, and complete both ways. What is received fits the sender's MTU: a guest's large frames
    are segmented, and their checksums filled in. Frames sent go as they are.

    Receiving never makes a sender wait: frames that find no room in the queue, because nobody
    reads, are lost and counted (`lost_full` of the sender). Sending waits while the other end's
    queue is full; without a driver at work there, or without carrier, frames are lost
    (`lost_down`), as on any cable.

    Several tasks may receive, and each gets other frames; all on one loop. Cancelling a receive
    loses no frame, cancelling a send leaves its frame unsent.
    """

    def __init__(self, end: CableEnd, name: str) -> None:
        self._end = end
        self._name = name
        self._waker: _Waker | None = None
        self._received: deque[bytes] = deque()
        self._buffer: CData | None = None
        self._lengths: CData | None = None
        self._one = ffi.new("uint32_t[1]")

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if self._received:
            return self._received.popleft()
        if frame := await self.receive():
            return frame
        raise StopAsyncIteration

    async def receive(self) -> bytes:
        """The next frame; b"" when no more can come, which also ends an iteration."""
        while (frame := self.receive_nowait()) is None:
            if self._is_over():
                return b""
            await self._wait()
        return frame

    async def receive_many(self, limit: int = _BATCH_FRAMES) -> list[bytes]:
        """At least one frame, and up to `limit` of those there are; [] when no more can come."""
        if not (frame := await self.receive()):
            return []
        frames = [frame]
        while len(frames) < limit and (more := self.receive_nowait()) is not None:
            frames.append(more)
        return frames

    def receive_nowait(self) -> bytes | None:
        """The next frame if there is one."""
        self._check()
        if not self._received:
            self._take()
        return self._received.popleft() if self._received else None

    async def send(self, frame: Frame) -> None:
        """Send a frame, when there is room for it. Raises ConfigError("frame") for one that is
        too short or too long."""
        while not self.send_nowait(frame):
            await self._wait()

    async def send_many(self, frames: Sequence[Frame]) -> None:
        """Send frames, in one go as far as there is room. When it is cancelled the first of them
        may have gone."""
        for frame in frames:
            self._check_frame(frame)
        data, lengths = b"".join(frames), [len(frame) for frame in frames]
        native = ffi.new("uint32_t[]", lengths)
        at, done = 0, 0
        while True:
            self._check()
            sent = lib.av_cable_send(
                self._end.native,
                ffi.NULL,
                ffi.from_buffer("uint8_t[]", data) + at,
                native + done,
                len(lengths) - done,
            )
            at += sum(lengths[done : done + sent])
            done += sent
            if done == len(lengths):
                return
            await self._wait()

    def send_nowait(self, frame: Frame) -> bool:
        """Send a frame if there is room for it."""
        self._check()
        self._check_frame(frame)
        self._one[0] = len(frame)
        native = self._end.native
        data = ffi.from_buffer("uint8_t[]", frame)
        return bool(lib.av_cable_send(native, ffi.NULL, data, self._one, 1))

    @property
    def is_up(self) -> bool:
        """Whether frames pass now: both ends are there, and the cable is in."""
        return bool(lib.av_cable_is_up(self._end.native))

    def statistics(self) -> LinkStatistics:
        """What Python sent and received here."""
        return self._end.statistics()

    @abstractmethod
    def _is_over(self) -> bool:
        """Whether no more frames can come."""

    @abstractmethod
    def _keeps_waker(self) -> bool:
        """Whether somebody will close what this end is watched by when nobody waits."""

    @abstractmethod
    def _check(self) -> None:
        """Raises ConfigError when Python may not use this end, or not any more."""

    def _check_frame(self, frame: Frame) -> None:
        if not FRAME_MIN_BYTES <= len(frame) <= FRAME_MAX_BYTES:
            raise ConfigError(
                "frame",
                f"{self._name}: a frame has {FRAME_MIN_BYTES} to {FRAME_MAX_BYTES} bytes, "
                f"this one {len(frame)}",
            )

    def _take(self) -> None:
        if self._buffer is None or self._lengths is None:
            self._buffer = ffi.new("uint8_t[]", _BATCH_BYTES)
            self._lengths = ffi.new("uint32_t[]", _BATCH_FRAMES)
        count = lib.av_cable_take(
            self._end.native, self._buffer, _BATCH_BYTES, self._lengths, _BATCH_FRAMES
        )
        if count == 0:
            return
        lengths = ffi.unpack(self._lengths, count)
        data = ffi.buffer(self._buffer, sum(lengths))[:]
        at = 0
        for length in lengths:
            self._received.append(data[at : at + length])
            at += length

    async def _wait(self) -> None:
        """Until something may have changed."""
        loop = asyncio.get_running_loop()
        if self._waker is None:
            self._waker = _Waker(loop, self._end)
        if self._waker.loop is not loop:
            raise ConfigError("loop", f"{self._name}: it is in use on another event loop")
        try:
            await self._waker.wait()
        finally:
            self._close_idle_waker()

    def _no_longer_kept(self) -> None:
        """Let all who wait look again; without any, give back the descriptor. Any thread."""
        lib.av_cable_wake(self._end.native)
        waker = self._waker
        if waker is None:
            return
        if waker.loop is _running_loop():
            self._close_idle_waker()
            return
        try:
            waker.loop.call_soon_threadsafe(self._close_idle_waker)
        except RuntimeError:  # that loop was closed, and nobody waits on it any more
            self._close_idle_waker()

    def _close_idle_waker(self) -> None:
        if self._waker is not None and not self._waker.waiting and not self._keeps_waker():
            self._waker.close()
            self._waker = None


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class _Waker:
    """An eventfd that wakes those who wait at a cable's end. Its loop only."""

    def __init__(self, loop: asyncio.AbstractEventLoop, end: CableEnd) -> None:
        self.loop = loop
        self.waiting: set[asyncio.Future[None]] = set()
        self._end = end
        self._fd = new_eventfd()
        try:
            add_reader(loop, self._fd, self._woken)
        except BaseException:
            os.close(self._fd)
            raise
        end.watch(self._fd)

    async def wait(self) -> None:
        future: asyncio.Future[None] = self.loop.create_future()
        self.waiting.add(future)
        try:
            await future
        finally:
            self.waiting.discard(future)

    def close(self) -> None:
        self._end.watch(-1)
        if not self.loop.is_closed():
            self.loop.remove_reader(self._fd)
        os.close(self._fd)
        self._release()

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):  # written and drained in the same turn
            os.eventfd_read(self._fd)
        self._release()

    def _release(self) -> None:
        for future in self.waiting:
            if not future.done():
                future.set_result(None)
