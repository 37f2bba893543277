"""Packed virtqueues (virtio 1.3 section 2.8): what of them shows in whole devices.

What any ring does with what a driver writes is in tests/unit/virtio_ring.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from avmm.virtio import features
from avmm.virtio.devices.rng import Rng, build
from avmm.virtio.devtype import DeviceContext
from avmm.virtio.python_device import Chain, PythonDevice, ServedDevice
from avmm.virtio.python_device import build as build_python
from fakes.driver_queue import Segment
from fakes.every_device import EVERY
from fakes.mmio_driver import eventually, settle
from fakes.virtio_rig import DATA_GPA

Rigged = Callable[..., Any]

pytestmark = pytest.mark.parametrize("layout", ["packed"], indirect=True)


class Gated(PythonDevice):
    """Answers each chain when its gate is opened."""

    virtio_id = 50

    def __init__(self) -> None:
        self.begun: list[bytes] = []
        self.gates: dict[bytes, asyncio.Event] = {}

    async def handle(self, chain: Chain) -> None:
        self.begun.append(chain.data)
        await self.gates.setdefault(chain.data, asyncio.Event()).wait()
        chain.write(chain.data)


@pytest.mark.spec("2.8.12", "take up descriptors in the order of the ring")
@pytest.mark.spec("2.8.12", "write used descriptors in the order in which buffers are done")
async def test_buffers_are_begun_in_ring_order_and_used_as_they_are_done(rigged: Rigged) -> None:
    device = Gated()

    async def make(context: DeviceContext) -> ServedDevice:
        return await build_python(device, context)

    async with rigged(make) as rig:
        await rig.driver.start(size=16)
        queue = rig.driver.queues[0]
        names = [b"abcd", b"efgh", b"ijkl", b"mnop"]
        ids = {}
        for at, name in enumerate(names):
            gpa = DATA_GPA + 64 * at
            rig.memory.write(gpa, name)
            ids[name] = queue.offer(Segment(gpa, 4), Segment(gpa + 32, 4, writable=True))
        rig.driver.kick(0)
        await eventually(lambda: len(device.begun) == len(names))
        assert device.begun == names
        done = [names[at] for at in (2, 0, 3, 1)]
        for name in done:
            device.gates[name].set()
            assert await rig.driver.used(0) == [(ids[name], 4)]


@pytest.mark.spec("2.8.15", "use no descriptor before it sees that it became available")
@pytest.mark.spec("2.8.15", "not change a descriptor that it has marked used")
async def test_used_descriptors_are_left_alone(rigged: Rigged) -> None:
    async with rigged(lambda context: build(Rng(), context)) as rig:
        await rig.driver.start(size=4)
        queue = rig.driver.queues[0]
        for count in range(1, 19):  # also after the wrap counters turned
            at = queue.desc_gpa + 16 * ((count - 1) % 4)
            id = queue.offer(Segment(DATA_GPA, 16, writable=True))
            rig.driver.kick(0)
            assert await rig.driver.used(0) == [(id, 16)]
            mine, ring = rig.memory.read(at, 16), rig.memory.read(queue.desc_gpa, 64)
            rig.driver.kick(0)
            await settle()
            assert rig.memory.read(queue.desc_gpa, 64) == ring
            assert rig.memory.read(at, 16) == mine
            assert queue.take_used() == []
            assert rig.device.statistics().queues[0].chains == count
        assert rig.device.statistics().faults == 0


@pytest.mark.spec("6.2", "with IN_ORDER use buffers in the order in which they became available")
async def test_a_nic_that_was_asked_for_order_keeps_it(rigged: Rigged) -> None:
    async with rigged(EVERY["net"]) as rig:
        await rig.driver.start()
        assert rig.driver.negotiated & features.IN_ORDER
        queue = rig.driver.queues[1]
        for batch in range(5):
            ids = []
            for at in range(8):
                gpa = DATA_GPA + 0x100 * at
                rig.memory.write(gpa, bytes(12) + bytes([batch, at]) * 30)
                ids.append(queue.offer(Segment(gpa, 72)))
            rig.driver.kick(1)
            for at in range(8):
                assert await rig.device.tap.sent() == bytes([batch, at]) * 30
            assert [id for id, _ in await rig.driver.used(1, 8)] == ids
