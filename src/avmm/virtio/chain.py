"""Chains of a queue that Python serves by itself: few, small, and never in the way of data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from avmm.errors import GuestFault
from avmm.native import CData, ffi, lib
from avmm.virtio.queue import Queue

_SEGMENTS_MAX = 256


@dataclass(frozen=True, slots=True)
class Chain:
    """One chain. data: a copy of what the driver wrote, None when it is longer than allowed.
    room_bytes: for an answer."""

    head: int
    data: bytes | None
    room_bytes: int
    room: tuple[memoryview, ...]


class ChainQueue:
    """A queue's chains, taken one after the other. Loop."""

    def __init__(self, queue: Queue, *, data_max_bytes: int) -> None:
        self.queue = queue
        self._data_max_bytes = data_max_bytes
        self._chain = ffi.new("struct av_chain *")
        self._iov = ffi.new(f"struct iovec[{_SEGMENTS_MAX}]")

    def take(self, limit: int | None = None) -> Iterator[Chain]:
        """All there is, but no more than `limit`, or than the ring holds. Kicks are wanted again
        at the end, unless `limit` was reached: then there may be more.

        Raises GuestFault when the driver broke the ring.
        """
        self.queue.take_kick()
        lib.av_vring_count_kick(self.queue.ring)
        left = self.queue.size if limit is None else limit
        lib.av_vring_kicks_off(self.queue.ring)
        while left:
            while left and (chain := self._pop()) is not None:
                left -= 1
                yield chain
            if left and not lib.av_vring_kicks_on(self.queue.ring):
                return
        if limit is None:
            self.queue.notify()  # the rest in another turn

    def answer(self, chain: Chain, data: bytes) -> None:
        """Give the chain back with an answer, which fits, and tell the driver."""
        self.give_back(chain, data)
        self.flush()

    def give_back(self, chain: Chain, data: bytes) -> None:
        """Give the chain back, in any order; the driver learns of it at the next flush()."""
        at = 0
        for piece in chain.room:
            count = min(len(piece), len(data) - at)
            piece[:count] = data[at : at + count]
            at += count
        lib.av_vring_push(self.queue.ring, chain.head, at)

    def flush(self) -> None:
        """Tell the driver of what was given back."""
        lib.av_vring_flush(self.queue.ring)

    def _pop(self) -> Chain | None:
        result = lib.av_vring_pop(self.queue.ring, self._chain, self._iov, _SEGMENTS_MAX)
        if result < 0:
            raise GuestFault(self.queue.fault, f"Queue {self.queue.index}: {self.queue.fault}")
        if result == 0:
            return None
        chain = self._chain
        pieces = [self._view(index) for index in range(chain.readable + chain.writable)]
        data = None
        if chain.readable_bytes <= self._data_max_bytes:
            data = b"".join(bytes(piece) for piece in pieces[: chain.readable])
        return Chain(chain.head, data, chain.writable_bytes, tuple(pieces[chain.readable :]))

    def _view(self, index: int) -> memoryview:
        segment: CData = self._iov[index]
        return memoryview(ffi.buffer(segment.iov_base, segment.iov_len))
