"""virtio-rng over the real ring: from the registers to bytes in guest memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from avmm.virtio.devices.rng import Rng, build
from fakes.driver_queue import Segment
from fakes.mmio_driver import settle
from fakes.pci_driver import pci_rig
from fakes.virtio_rig import DATA_GPA, virtio_rig

Rigged = Callable[..., Any]

pytestmark = pytest.mark.parametrize("rigged", [virtio_rig, pci_rig], ids=["mmio", "pci"])


async def test_fills_the_buffers_of_the_driver(rigged: Rigged) -> None:
    async with rigged(lambda context: build(Rng(), context)) as rig:
        await rig.driver.start()
        queue = rig.driver.queues[0]
        head = queue.offer(
            Segment(DATA_GPA, 100, writable=True), Segment(DATA_GPA + 1000, 28, writable=True)
        )
        rig.driver.kick(0)
        assert await rig.driver.used(0) == [(head, 128)]
        assert rig.memory.read(DATA_GPA, 100) != bytes(100)
        assert rig.memory.read(DATA_GPA + 1000, 28) != bytes(28)
        assert rig.memory.read(DATA_GPA + 100, 900) == bytes(900)


async def test_works_without_event_idx_and_indirect(rigged: Rigged) -> None:
    async with rigged(lambda context: build(Rng(), context)) as rig:
        await rig.driver.start(features=1 << 32)
        head = rig.driver.queues[0].offer(Segment(DATA_GPA, 64, writable=True))
        rig.driver.kick(0)
        assert await rig.driver.used(0) == [(head, 64)]


async def test_a_queue_full_of_buffers_comes_back_with_one_kick(rigged: Rigged) -> None:
    async with rigged(lambda context: build(Rng(), context)) as rig:
        await rig.driver.start(size=16)
        queue = rig.driver.queues[0]
        for at in range(16):
            queue.offer(Segment(DATA_GPA + 0x2000 * at, 0x2000, writable=True))
        rig.driver.kick(0)
        used = await rig.driver.used(0, 16)
        assert sorted(head for head, _ in used) == list(range(16))
        assert all(0 < written <= 0x2000 for _, written in used)


async def test_chains_offered_before_driver_ok_wait_for_it(rigged: Rigged) -> None:
    async with rigged(lambda context: build(Rng(), context)) as rig:
        driver = rig.driver
        await driver.probe()
        assert await driver.negotiate(await driver.read_features())
        await settle()
        driver.kick(0)
        await settle()
        stats = rig.device.statistics()
        assert stats.queues[0].chains == 0
        assert stats.interrupts == 0
        await driver.start()
        head = driver.queues[0].offer(Segment(DATA_GPA, 64, writable=True))
        driver.kick(0)
        assert await driver.used(0) == [(head, 64)]
