"""Who may send how much (virtio 1.3 section 5.10.6.3): counters of bytes, modulo 2^32."""

from __future__ import annotations

from typing import Final

BUFFER_BYTES: Final = 256 * 1024
"""What we keep of one connection for a reader that does not read; the guest stops then."""
UPDATE_BYTES: Final = BUFFER_BYTES // 4
"""The guest is told of room when there is so much more than it knows of."""

_MASK: Final = 0xFFFF_FFFF


class Credit:
    """Both directions of one connection. Of the guest's counters nothing is believed."""

    __slots__ = ("_alloc", "_forwarded", "_guest_forwarded", "_received", "_sent", "_told")

    def __init__(self) -> None:
        self._received = self._forwarded = self._told = 0
        self._sent = self._alloc = self._guest_forwarded = 0

    @property
    def forwarded(self) -> int:
        """fwd_cnt of a packet to the guest; buf_alloc is BUFFER_BYTES."""
        return self._forwarded & _MASK

    @property
    def room(self) -> int:
        """How many bytes the guest takes now."""
        return max(0, self._alloc - (self._sent - self._guest_forwarded))

    @property
    def unread(self) -> int:
        """Bytes received and not forwarded."""
        return self._received - self._forwarded

    @property
    def update_due(self) -> bool:
        """Whether the guest should hear that there is room again."""
        return self._forwarded - self._told >= UPDATE_BYTES

    def receive(self, count: int) -> bool:
        """The guest sent that much; False when it may not, and then nothing is counted."""
        if self._received + count - self._forwarded > BUFFER_BYTES:
            return False
        self._received += count
        return True

    def forward(self, count: int) -> None:
        """Whoever reads took that much."""
        self._forwarded += count

    def tell(self) -> None:
        """A packet with our counters goes to the guest."""
        self._told = self._forwarded

    def send(self, count: int) -> None:
        """We send that much, which is no more than `room`."""
        self._sent += count

    def hear(self, buf_alloc: int, fwd_cnt: int) -> bool:
        """The guest's counters in a packet; False when it has read more than it was sent, or less
        than before."""
        ahead = (fwd_cnt - self._guest_forwarded) & _MASK
        if ahead > self._sent - self._guest_forwarded:
            return False
        self._guest_forwarded += ahead
        self._alloc = buf_alloc
        return True
