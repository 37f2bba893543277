"""vhost-net without a kernel: remembers what it is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from avmm.hostnet.vhost import VhostRing
from avmm.virtio import features

FEATURES = (
    features.VERSION_1
    | features.RING_EVENT_IDX
    | features.RING_INDIRECT_DESC
    | features.NET_MRG_RXBUF
)


class FakeVhost:
    """made: all of them, in order. rings: those that run, with the TAP's descriptor. calls: by
    name and ring."""

    def __init__(self, made: list[FakeVhost]) -> None:
        made.append(self)
        self.features = FEATURES
        self.agreed: int | None = None
        self.memory: list[tuple[int, int, int]] = []
        self.rings: dict[int, tuple[VhostRing, int]] = {}
        self.calls: list[tuple[str, int]] = []
        self.base = 0
        self.closed = False

    def set_features(self, bits: int) -> None:
        assert not self.rings
        assert not bits & ~self.features
        self.agreed = bits

    def set_memory(self, regions: Sequence[tuple[int, int, int]]) -> None:
        self.memory = list(regions)

    def start(self, index: int, ring: VhostRing, tap_fd: int) -> None:
        assert index not in self.rings
        self.calls.append(("start", index))
        self.rings[index] = (ring, tap_fd)

    def set_call(self, index: int, fd: int) -> None:
        self.calls.append(("call", index))
        ring, tap_fd = self.rings[index]
        values = {name: getattr(ring, name) for name in ring.__slots__} | {"call_fd": fd}
        self.rings[index] = (VhostRing(**values), tap_fd)

    def stop(self, index: int) -> int:
        self.calls.append(("stop", index))
        del self.rings[index]
        return self.base

    def close(self) -> None:
        assert not self.rings
        self.closed = True
