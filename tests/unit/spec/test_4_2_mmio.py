"""Virtio over MMIO (virtio 1.3 section 4.2.2.1)."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from avmm.virtio import features
from avmm.virtio.devices.rng import Rng, RngDevice, build
from avmm.virtio.interrupt import CONFIG_CHANGE, USED_BUFFER
from avmm.virtio.state import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK
from avmm.virtio.transport import mmio
from fakes.driver_queue import Segment
from fakes.every_device import EVERY
from fakes.mmio_driver import settle
from fakes.virtio_rig import DATA_GPA, Rig, virtio_rig


@pytest.fixture
async def rig(layout: str) -> AsyncIterator[Rig[RngDevice]]:
    async with virtio_rig(lambda context: build(Rng(), context)) as rig:
        yield rig


async def use_one(rig: Rig[RngDevice]) -> None:
    """A buffer is offered and used."""
    queue = rig.driver.queues[0]
    queue.offer(Segment(DATA_GPA, 16, writable=True))
    rig.driver.kick(0)
    used = queue.take_used()
    while not used:
        await settle()
        used = queue.take_used()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.spec("4.2.2.1", "return 0x74726976 as MagicValue")
@pytest.mark.spec("4.2.2.1", "return 2 as Version")
async def test_every_device_is_recognized(name: str) -> None:
    async with virtio_rig(EVERY[name]) as rig:
        assert rig.driver.read(mmio.MAGIC_VALUE) == 0x74726976
        assert rig.driver.read(mmio.VERSION) == 2
        assert rig.driver.read(mmio.DEVICE_ID) == rig.device.device_type.virtio_id


@pytest.mark.spec("4.2.2.1", "show each event in InterruptStatus until the driver acknowledges it")
@pytest.mark.spec("4.2.2.1", "keep 0 the bits of InterruptStatus of which nothing happened")
async def test_interrupt_status_shows_events_until_they_are_acknowledged(
    rig: Rig[RngDevice],
) -> None:
    driver = rig.driver
    await driver.start()
    assert driver.read(mmio.INTERRUPT_STATUS) == 0
    await use_one(rig)
    assert driver.read(mmio.INTERRUPT_STATUS) == USED_BUFFER
    assert driver.read(mmio.INTERRUPT_STATUS) == USED_BUFFER
    rig.device.set_config(b"new")
    assert driver.read(mmio.INTERRUPT_STATUS) == USED_BUFFER | CONFIG_CHANGE
    await driver.write(mmio.INTERRUPT_ACK, USED_BUFFER)
    assert driver.read(mmio.INTERRUPT_STATUS) == CONFIG_CHANGE
    await driver.write(mmio.INTERRUPT_ACK, USED_BUFFER)
    assert driver.read(mmio.INTERRUPT_STATUS) == CONFIG_CHANGE
    await driver.write(mmio.INTERRUPT_ACK, CONFIG_CHANGE)
    assert driver.read(mmio.INTERRUPT_STATUS) == 0
    await use_one(rig)
    assert driver.read(mmio.INTERRUPT_STATUS) == USED_BUFFER


@pytest.mark.spec("4.2.2.1", "clear InterruptStatus and every QueueReady upon a reset")
async def test_a_reset_clears_interrupt_status_and_queue_ready() -> None:
    async with virtio_rig(EVERY["ports"]) as rig:
        driver = rig.driver
        await driver.start()
        rig.device.set_config(b"new")
        assert driver.read(mmio.INTERRUPT_STATUS) & CONFIG_CHANGE
        assert len(driver.queues) > 2
        await driver.write(mmio.STATUS, 0)
        assert driver.read(mmio.INTERRUPT_STATUS) == 0
        for index in range(len(driver.queues)):
            await driver.write(mmio.QUEUE_SEL, index)
            assert driver.read(mmio.QUEUE_READY) == 0


@pytest.mark.spec("4.2.2.1", "change ConfigGeneration if a driver could see an inconsistent state")
async def test_the_generation_tells_an_old_configuration_from_a_new_one(
    rig: Rig[RngDevice],
) -> None:
    driver = rig.driver
    rig.device.set_config(b"\x11" * 8)
    await driver.start()
    for count in range(300):
        before = driver.read(mmio.CONFIG_GENERATION)
        low = driver.read(mmio.CONFIG, 4)
        rig.device.set_config(bytes([count & 0xFF]) * 8)
        high = driver.read(mmio.CONFIG + 4, 4)
        assert low == high or driver.read(mmio.CONFIG_GENERATION) != before
    steady = driver.read(mmio.CONFIG_GENERATION)
    assert driver.read(mmio.CONFIG, 4) == driver.read(mmio.CONFIG + 4, 4)
    assert driver.read(mmio.CONFIG_GENERATION) == steady


@pytest.mark.spec("4.2.2.1", "not touch a queue whose QueueReady is 0")
async def test_a_queue_that_never_was_ready_is_not_touched(rig: Rig[RngDevice]) -> None:
    driver = rig.driver
    await driver.negotiate(await driver.read_features() & ~features.IN_ORDER)
    queue = driver.new_queue(0x10000, 8)
    await driver.set_up_queue(0, queue, ready=False)
    await driver.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
    queue.offer(Segment(DATA_GPA, 64, writable=True))
    before = rig.memory.read(queue.desc_gpa, queue.end_gpa - queue.desc_gpa)
    rig.transport.device.queues[0].notify()
    await settle()
    assert rig.memory.read(queue.desc_gpa, queue.end_gpa - queue.desc_gpa) == before
    assert rig.memory.read(DATA_GPA, 64) == bytes(64)
    assert await driver.take_interrupts() == 0
