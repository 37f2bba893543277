"""The entropy device (virtio 1.3 section 5.4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from avmm.virtio.devices.rng import Rng, build
from fakes.driver_queue import Segment
from fakes.virtio_rig import DATA_GPA

Rigged = Callable[..., Any]

ROOM_BYTES = 0x2_0000


@pytest.mark.spec("5.4.6.2", "place one or more random bytes into each buffer")
@pytest.mark.parametrize("size", [1, 2, 15, 16, 4096, 100_000])
async def test_every_buffer_gets_bytes_and_no_two_the_same(rigged: Rigged, size: int) -> None:
    async with rigged(lambda context: build(Rng(), context)) as rig:
        await rig.driver.start()
        queue = rig.driver.queues[0]
        before = bytes([0xA5]) * (size + 16)
        places: dict[int, int] = {}
        for index in range(8):
            gpa = DATA_GPA + ROOM_BYTES * index
            rig.memory.write(gpa, before)
            cut = size // 2 if index % 2 else 0
            pieces = [Segment(gpa + cut, size - cut, writable=True)]
            if cut:
                pieces.insert(0, Segment(gpa, cut, writable=True))
            places[queue.offer(*pieces)] = gpa
        rig.driver.kick(0)
        found = []
        for head, written in await rig.driver.used(0, 8):
            assert 1 <= written <= size
            data = rig.memory.read(places.pop(head), size + 16)
            assert data[written:] == before[written:]
            found.append(data[:written])
        assert places == {}
        together = b"".join(found)
        assert len(together) < 16 or together != before[: len(together)]
        if size >= 16:
            assert len(set(found)) == 8
            assert all(len(set(data)) > 1 for data in found)
