"""Device reset (virtio 1.3 section 2.4)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from avmm.virtio.devices.rng import Rng, build
from avmm.virtio.devtype import DeviceContext
from avmm.virtio.python_device import Chain, PythonDevice, ServedDevice
from avmm.virtio.python_device import build as build_python
from avmm.virtio.state import ACKNOWLEDGE, DRIVER, FAILED, FEATURES_OK
from fakes.driver_queue import DriverQueue, Segment
from fakes.mmio_driver import settle
from fakes.virtio_rig import DATA_GPA

Rigged = Callable[..., Any]

ZERO = "show status 0 after a reset"
QUIET = "neither notify nor touch the queues after a reset, until it is set up again"


class Slow(PythonDevice):
    """Answers when it is let, also after it was cancelled."""

    virtio_id = 50

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.gate = asyncio.Event()

    async def handle(self, chain: Chain) -> None:
        self.begun.set()
        await self.gate.wait()
        chain.write(b"late")


def ring(rig: Any, queue: DriverQueue) -> bytes:
    """The queue's memory, and that of its buffers."""
    memory: bytes = rig.memory.read(queue.desc_gpa, queue.end_gpa - queue.desc_gpa)
    return memory + rig.memory.read(DATA_GPA, 0x1000)


@pytest.mark.parametrize(
    "status",
    [ACKNOWLEDGE, ACKNOWLEDGE | DRIVER, ACKNOWLEDGE | DRIVER | FEATURES_OK, FAILED, 0xFF],
)
@pytest.mark.spec("2.4.1", ZERO)
async def test_a_reset_takes_back_every_status(rigged: Rigged, status: int) -> None:
    async with rigged(lambda context: build(Rng(), context)) as rig:
        await rig.driver.probe()
        await rig.driver.set_status(status)
        assert rig.driver.status() != 0
        await rig.driver.set_status(0)
        assert rig.driver.status() == 0


@pytest.mark.spec("2.4.1", ZERO)
async def test_a_reset_takes_back_needs_reset(rigged: Rigged) -> None:
    async with rigged(lambda context: build(Rng(), context)) as rig:
        await rig.driver.start()
        rig.driver.queues[0].offer_broken()
        rig.driver.kick(0)
        await rig.driver.interrupted()
        await rig.driver.set_status(0)
        assert rig.driver.status() == 0


@pytest.mark.spec("2.4.1", QUIET)
async def test_buffers_offered_after_a_reset_stay_untouched(rigged: Rigged) -> None:
    async with rigged(lambda context: build(Rng(), context)) as rig:
        await rig.driver.start()
        queue = rig.driver.queues[0]
        queue.offer(Segment(DATA_GPA, 64, writable=True))
        rig.driver.kick(0)
        await rig.driver.used(0)
        await rig.driver.set_status(0)
        queue.offer(Segment(DATA_GPA + 64, 64, writable=True))
        before = ring(rig, queue)
        rig.driver.kick(0)
        rig.device.set_config(b"new")
        await settle()
        assert ring(rig, queue) == before
        assert await rig.driver.take_interrupts() == 0


@pytest.mark.spec("2.4.1", QUIET)
async def test_what_was_in_flight_is_not_answered_after_a_reset(rigged: Rigged) -> None:
    device = Slow()

    async def make(context: DeviceContext) -> ServedDevice:
        return await build_python(device, context)

    async with rigged(make) as rig:
        await rig.driver.start()
        queue = rig.driver.queues[0]
        queue.offer(Segment(DATA_GPA, 16, writable=True))
        rig.driver.kick(0)
        await device.begun.wait()
        await rig.driver.set_status(0)
        await rig.driver.take_interrupts()  # sent before the reset was complete
        before = ring(rig, queue)
        device.gate.set()
        await settle()
        assert ring(rig, queue) == before
        assert await rig.driver.take_interrupts() == 0
