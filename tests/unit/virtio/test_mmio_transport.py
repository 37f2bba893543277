"""The registers of virtio-mmio, driven as a guest does (virtio 1.3 section 4.2)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from avmm.bus.region import Call, Post
from avmm.virtio import features
from avmm.virtio.devices.rng import Rng, RngDevice, build
from avmm.virtio.interrupt import CONFIG_CHANGE
from avmm.virtio.state import ACKNOWLEDGE, DEVICE_NEEDS_RESET, DRIVER, DRIVER_OK, FEATURES_OK
from avmm.virtio.transport import mmio
from fakes.driver_queue import DriverQueue, Segment
from fakes.mmio_driver import perform, settle
from fakes.virtio_rig import DATA_GPA, MEMORY_BYTES, Rig, virtio_rig

SET_UP = ACKNOWLEDGE | DRIVER | FEATURES_OK


@pytest.fixture
async def rig() -> AsyncIterator[Rig[RngDevice]]:
    async with virtio_rig(lambda context: build(Rng(), context)) as rig:
        yield rig
        assert rig.errors == []


@pytest.mark.spec("4.2.2.1", "return 0x74726976 as MagicValue")
@pytest.mark.spec("4.2.2.1", "return 2 as Version")
async def test_identifies_itself(rig: Rig[RngDevice]) -> None:
    driver = rig.driver
    assert driver.read(mmio.MAGIC_VALUE) == 0x74726976
    assert driver.read(mmio.VERSION) == 2
    assert driver.read(mmio.DEVICE_ID) == 4
    assert driver.read(mmio.VENDOR_ID).to_bytes(4, "little") == b"avmm"
    assert driver.read(mmio.STATUS) == 0


async def test_offers_version_1_and_nothing_past_the_second_word(rig: Rig[RngDevice]) -> None:
    assert await rig.driver.read_features() & features.VERSION_1
    await rig.driver.write(mmio.DEVICE_FEATURES_SEL, 2)
    assert rig.driver.read(mmio.DEVICE_FEATURES) == 0


@pytest.mark.parametrize("accepted", [0, features.VERSION_1 | 1, features.RING_EVENT_IDX])
async def test_bad_features_are_refused(rig: Rig[RngDevice], accepted: int) -> None:
    assert not await rig.driver.negotiate(accepted)


async def test_a_feature_bit_of_the_third_word_is_refused(rig: Rig[RngDevice]) -> None:
    driver = rig.driver
    await driver.write(mmio.STATUS, ACKNOWLEDGE | DRIVER)
    await driver.write_features(features.VERSION_1)
    await driver.write(mmio.DRIVER_FEATURES_SEL, 2)
    await driver.write(mmio.DRIVER_FEATURES, 1)
    await driver.write(mmio.STATUS, SET_UP)
    assert not driver.read(mmio.STATUS) & FEATURES_OK


async def test_a_queue_that_does_not_exist_has_no_size_and_is_never_ready(
    rig: Rig[RngDevice],
) -> None:
    driver = rig.driver
    await driver.negotiate(features.VERSION_1)
    await driver.write(mmio.QUEUE_SEL, 1)
    await driver.write(mmio.QUEUE_SIZE, 8)
    await driver.write(mmio.QUEUE_READY, 1)
    assert driver.read(mmio.QUEUE_SIZE_MAX) == 0
    assert driver.read(mmio.QUEUE_READY) == 0
    assert driver.read(mmio.STATUS) == SET_UP


@pytest.mark.parametrize(
    ("size", "shift_gpa", "kind"),
    [
        (0, 0, "queue-size"),
        (3, 0, "queue-size"),
        (33, 0, "queue-size"),
        (128, 0, "queue-size"),
        (0x10008, 0, "queue-size"),
        (8, 1, "queue-address"),
        (8, MEMORY_BYTES, "queue-address"),
        (8, 0xFFFF_FFFF_FFF0_0000, "queue-address"),
    ],
)
async def test_a_bad_queue_is_a_fault(
    rig: Rig[RngDevice], size: int, shift_gpa: int, kind: str
) -> None:
    driver = rig.driver
    await driver.negotiate(features.VERSION_1)
    queue = DriverQueue(rig.memory, 0x10000, 8)
    queue.size = size
    queue.desc_gpa += shift_gpa
    await driver.set_up_queue(0, queue)
    assert driver.read(mmio.QUEUE_READY) == 0
    assert driver.read(mmio.STATUS) == SET_UP | DEVICE_NEEDS_RESET
    assert rig.device.statistics().last_fault == kind
    assert rig.device.statistics().interrupts == 0
    await driver.write(mmio.STATUS, SET_UP | DRIVER_OK)
    assert await driver.interrupted() == CONFIG_CHANGE


async def test_a_reset_recovers_from_a_bad_queue(rig: Rig[RngDevice]) -> None:
    driver = rig.driver
    await driver.negotiate(features.VERSION_1)
    await driver.set_up_queue(0, DriverQueue(rig.memory, 0x10008, 8))
    assert driver.read(mmio.STATUS) & DEVICE_NEEDS_RESET
    await assert_fills(rig)


async def assert_fills(rig: Rig[RngDevice]) -> None:
    """From a reset on, the device does its work."""
    await rig.driver.start()
    head = rig.driver.queues[0].offer(Segment(DATA_GPA, 32, writable=True))
    rig.driver.kick(0)
    assert await rig.driver.used(0) == [(head, 32)]


async def test_addresses_are_fixed_while_the_queue_is_ready(rig: Rig[RngDevice]) -> None:
    driver = rig.driver
    await driver.start()
    before = (rig.device.queues[0].desc_gpa, rig.device.queues[0].size, rig.device.ignored)
    await driver.set_up_queue(0, driver.new_queue(0x20000, 8), ready=False)
    queue = rig.device.queues[0]
    assert (queue.desc_gpa, queue.size, rig.device.ignored) == (*before[:2], before[2] + 7)


@pytest.mark.spec("4.2.2.1", "not touch a queue whose QueueReady is 0")
async def test_a_queue_is_taken_away_and_offered_again(rig: Rig[RngDevice]) -> None:
    driver = rig.driver
    await driver.start()
    await driver.write(mmio.QUEUE_READY, 0)
    await driver.write(mmio.QUEUE_SEL, 0)
    await driver.write(mmio.QUEUE_READY, 0)
    assert driver.read(mmio.QUEUE_READY) == 0
    driver.queues[0].offer(Segment(DATA_GPA, 32, writable=True))
    driver.kick(0)
    await settle()
    assert driver.queues[0].take_used() == []
    queue = driver.queues[0] = driver.new_queue(0x20000, 8)
    await driver.set_up_queue(0, queue)
    head = queue.offer(Segment(DATA_GPA, 32, writable=True))
    driver.kick(0)
    assert await driver.used(0) == [(head, 32)]


async def test_a_broken_ring_needs_a_reset_and_recovers_by_it(rig: Rig[RngDevice]) -> None:
    driver = rig.driver
    await driver.start()
    kind = driver.queues[0].offer_broken()
    driver.kick(0)
    assert await driver.interrupted() == CONFIG_CHANGE
    assert driver.read(mmio.STATUS) & DEVICE_NEEDS_RESET
    stats = rig.device.statistics()
    assert (stats.faults, stats.last_fault) == (1, kind)
    driver.kick(0)
    await settle()
    assert rig.device.statistics().faults == 1
    await assert_fills(rig)
    assert not driver.read(mmio.STATUS) & DEVICE_NEEDS_RESET


async def test_a_plain_write_of_queue_notify_kicks_too(rig: Rig[RngDevice]) -> None:
    await rig.driver.start()
    head = rig.driver.queues[0].offer(Segment(DATA_GPA, 32, writable=True))
    deferred = rig.transport.write(mmio.QUEUE_NOTIFY, 4, 0)
    assert isinstance(deferred, Post)
    await perform(deferred)
    assert await rig.driver.used(0) == [(head, 32)]
    await rig.driver.write(mmio.QUEUE_NOTIFY, 77)


@pytest.mark.parametrize("register", [mmio.STATUS, mmio.QUEUE_READY, mmio.CONFIG])
async def test_writes_with_consequences_are_calls(rig: Rig[RngDevice], register: int) -> None:
    deferred = rig.transport.write(register, 4, 0)
    assert isinstance(deferred, Call)
    await perform(deferred)


@pytest.mark.spec("4.2.2.1", "clear InterruptStatus and every QueueReady upon a reset")
async def test_status_shows_a_reset_only_when_it_is_done(rig: Rig[RngDevice]) -> None:
    await rig.driver.start()
    deferred = rig.transport.write(mmio.STATUS, 4, 0)
    assert rig.driver.read(mmio.STATUS) == SET_UP | DRIVER_OK
    await perform(deferred)
    assert rig.driver.read(mmio.STATUS) == 0
    assert rig.driver.read(mmio.INTERRUPT_STATUS) == 0
    assert rig.driver.read(mmio.QUEUE_READY) == 0


async def test_a_shared_memory_region_does_not_exist(rig: Rig[RngDevice]) -> None:
    await rig.driver.write(mmio.SHM_SEL, 0)
    assert [rig.driver.read(r) for r in mmio.SHM_REGISTERS] == [0xFFFF_FFFF] * 4


@pytest.mark.parametrize("size", [1, 2, 8])
async def test_registers_answer_only_whole_words(rig: Rig[RngDevice], size: int) -> None:
    assert rig.driver.read(mmio.MAGIC_VALUE, size) == 0
    await rig.driver.write(mmio.STATUS, ACKNOWLEDGE, size)
    assert rig.driver.read(mmio.STATUS) == 0
    assert rig.device.ignored == 2


async def test_a_driver_that_keeps_the_rules_has_nothing_ignored(rig: Rig[RngDevice]) -> None:
    await assert_fills(rig)
    await rig.driver.write(mmio.STATUS, 0)
    assert rig.device.ignored == 0


async def test_the_configuration_reads_zero_past_its_end(rig: Rig[RngDevice]) -> None:
    rig.device.set_config(b"\x11\x22\x33")
    driver = rig.driver
    assert driver.read(mmio.CONFIG, 2) == 0x2211
    assert driver.read(mmio.CONFIG + 1, 1) == 0x22
    assert driver.read(mmio.CONFIG + 2, 4) == 0x33
    assert driver.read(mmio.CONFIG + 3, 8) == 0
    assert driver.read(mmio.CONFIG + 0xF8, 8) == 0


@pytest.mark.spec("4.2.2.1", "change ConfigGeneration if a driver could see an inconsistent state")
async def test_a_new_configuration_has_a_new_generation_and_interrupts(
    rig: Rig[RngDevice],
) -> None:
    driver = rig.driver
    rig.device.set_config(b"\x01")
    assert rig.device.statistics().interrupts == 0  # nobody to tell yet
    await driver.start()
    before = driver.read(mmio.CONFIG_GENERATION)
    rig.device.set_config(b"\x02")
    assert driver.read(mmio.CONFIG_GENERATION) != before
    assert await driver.interrupted() == CONFIG_CHANGE
    assert driver.read(mmio.CONFIG, 1) == 2


async def test_two_vcpus_may_reset_and_start_at_once(rig: Rig[RngDevice]) -> None:
    await rig.driver.start()
    writes = [rig.transport.write(mmio.STATUS, 4, value) for value in (0, SET_UP, 0, 0)]
    await asyncio.gather(*(perform(write) for write in writes))
    await assert_fills(rig)


@pytest.mark.parametrize("seed", range(8))
async def test_no_access_raises_and_a_reset_always_helps(rig: Rig[RngDevice], seed: int) -> None:
    source = random.Random(seed)
    registers = (*rig.transport._reads, *rig.transport._writes, *mmio._ADDRESSES)
    for _ in range(3000):
        offset = source.choice((source.choice(registers), source.randrange(0x200)))
        size = source.choice((1, 2, 4, 4, 4, 4, 8))
        value = source.choice((0, 1, 4, 15, 0xFFFF_FFFF, 2**64 - 1, source.getrandbits(64)))
        if source.random() < 0.4:
            assert 0 <= rig.driver.read(offset, size) < 1 << 8 * size
        else:
            await rig.driver.write(offset, value, size)
    await settle()
    rig.device.interrupts.acknowledge(0xFFFF_FFFF)
    await assert_fills(rig)
