"""The device status field (virtio 1.3 section 2.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from avmm.virtio.devices.rng import Rng, RngDevice, build
from avmm.virtio.devtype import DeviceContext
from avmm.virtio.interrupt import CONFIG_CHANGE
from avmm.virtio.state import (
    ACKNOWLEDGE,
    DEVICE_NEEDS_RESET,
    DRIVER,
    DRIVER_OK,
    FEATURES_OK,
)
from fakes.driver_queue import Segment
from fakes.mmio_driver import settle
from fakes.virtio_rig import DATA_GPA

Rigged = Callable[..., Any]


async def rng(context: DeviceContext) -> RngDevice:
    return await build(Rng(), context)


@pytest.mark.spec(
    "2.1.2", "neither consume buffers nor send notifications of used ones before DRIVER_OK"
)
async def test_buffers_wait_for_driver_ok(rigged: Rigged) -> None:
    async with rigged(rng) as rig:
        await rig.driver.set_up()
        queue = rig.driver.queues[0]
        head = queue.offer(Segment(DATA_GPA, 64, writable=True))
        rig.driver.kick(0)
        await settle()
        assert queue.take_used() == []
        assert rig.memory.read(DATA_GPA, 64) == bytes(64)
        assert await rig.driver.take_interrupts() == 0
        await rig.driver.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
        assert await rig.driver.used(0) == [(head, 64)]


@pytest.mark.spec(
    "2.1.2",
    "notify of a configuration change after it set DEVICE_NEEDS_RESET under DRIVER_OK",
)
async def test_a_broken_device_tells_the_driver(rigged: Rigged) -> None:
    async with rigged(rng) as rig:
        await rig.driver.start()
        rig.driver.queues[0].offer_broken()
        rig.driver.kick(0)
        assert await rig.driver.interrupted() & CONFIG_CHANGE
        assert rig.driver.status() & DEVICE_NEEDS_RESET
