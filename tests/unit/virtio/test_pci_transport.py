"""The registers of virtio-pci, driven as a guest does (virtio 1.3 section 4.1)."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator

import pytest

from avmm.bus.region import Call
from avmm.pci import function as header
from avmm.pci import msix
from avmm.virtio import features
from avmm.virtio.device import VirtioDevice
from avmm.virtio.devices.rng import RNG, Rng, RngDevice, build
from avmm.virtio.devtype import DeviceContext
from avmm.virtio.interrupt import CONFIG_CHANGE, NO_FD, USED_BUFFER
from avmm.virtio.state import ACKNOWLEDGE, DEVICE_NEEDS_RESET, DRIVER, DRIVER_OK, FEATURES_OK
from avmm.virtio.transport import pci, pci_common, pci_vectors
from fakes.driver_queue import DriverQueue, Segment
from fakes.mmio_driver import settle
from fakes.pci_driver import PciRig, pci_rig
from fakes.pci_host import HIGH, LOW
from fakes.virtio_rig import DATA_GPA

SET_UP = ACKNOWLEDGE | DRIVER | FEATURES_OK


class Idle(VirtioDevice):
    """Has queues, and serves none."""

    def __init__(self, context: DeviceContext, queues: int) -> None:
        super().__init__(RNG, context, offered=0, queue_sizes=(8,) * queues)

    def kick(self, index: int) -> bool:
        self.queues[index].take_kick()
        return False


@pytest.fixture
async def rig() -> AsyncIterator[PciRig[RngDevice]]:
    async with pci_rig(lambda context: build(Rng(), context)) as rig:
        await rig.driver.probe()
        yield rig
        assert rig.errors == []


async def assert_fills(rig: PciRig[RngDevice]) -> None:
    """From a reset on, the device does its work."""
    await rig.driver.start()
    head = rig.driver.queues[0].offer(Segment(DATA_GPA, 32, writable=True))
    rig.driver.kick(0)
    assert await rig.driver.used(0) == [(head, 32)]


async def test_identifies_itself(rig: PciRig[RngDevice]) -> None:
    read = rig.driver.config_read
    assert read(header.VENDOR_ID, 4) == 0x1044_1AF4
    assert read(header.REVISION_ID, 1) == 1
    assert read(header.SUBSYSTEM_VENDOR_ID, 4) == 0x1044_1AF4


async def test_every_part_has_a_capability_in_the_bar(rig: PciRig[RngDevice]) -> None:
    kinds = [kind for kind, _ in rig.driver.capabilities()]
    assert kinds == [msix.CAPABILITY_ID] + [pci.VENDOR_CAPABILITY_ID] * 4
    assert set(rig.driver.parts) == {pci.CFG_COMMON, pci.CFG_NOTIFY, pci.CFG_ISR, pci.CFG_PCI}
    assert rig.driver.vectors == 2
    for gpa, length in rig.driver.parts.values():
        assert LOW.gpa <= gpa
        assert gpa + length <= LOW.gpa + pci.BAR_BYTES


async def test_a_device_with_a_configuration_shows_it() -> None:
    async def with_config(context: DeviceContext) -> RngDevice:
        device = RngDevice(Rng(), context)
        device.set_config(b"\x11\x22\x33", notify=False)
        return device

    async with pci_rig(with_config) as rig:
        await rig.driver.probe()
        at, length = rig.driver.parts[pci.CFG_DEVICE]
        assert length >= 3
        assert rig.cpu.read(at, 2) == 0x2211
        assert rig.cpu.read(at + 2, 4) == 0x33
        assert rig.cpu.read(at + length - 8, 8) == 0
        await rig.driver.start()
        before = rig.driver.read(pci_common.CONFIG_GENERATION, 1)
        rig.device.set_config(b"\x44")
        assert rig.driver.read(pci_common.CONFIG_GENERATION, 1) != before
        assert await rig.driver.interrupted() == CONFIG_CHANGE
        assert rig.cpu.read(at, 1) == 0x44


async def test_works_from_the_capability_list_to_the_message(rig: PciRig[RngDevice]) -> None:
    await assert_fills(rig)
    assert rig.device.ignored == 0
    assert rig.device.statistics().interrupts == 1


@pytest.mark.parametrize("accepted", [0, features.VERSION_1 | 1, features.RING_EVENT_IDX])
async def test_bad_features_are_refused(rig: PciRig[RngDevice], accepted: int) -> None:
    assert not await rig.driver.negotiate(accepted)


async def test_fields_read_back_what_was_written(rig: PciRig[RngDevice]) -> None:
    driver = rig.driver
    await driver.negotiate(features.VERSION_1)
    await driver.write(pci_common.DRIVER_FEATURE_SELECT, 4, 1)
    assert driver.read(pci_common.DRIVER_FEATURE_SELECT, 4) == 1
    assert driver.read(pci_common.DRIVER_FEATURE, 4) == 1
    assert driver.read(pci_common.NUM_QUEUES, 2) == 1
    queue = DriverQueue(rig.memory, 0x10000, 8)
    await driver.set_up_queue(0, queue, ready=False)
    assert driver.read(pci_common.QUEUE_SIZE, 2) == 8
    assert driver.read(pci_common.QUEUE_DESC, 4) == queue.desc_gpa
    assert driver.read(pci_common.QUEUE_DRIVER, 4) == queue.driver_gpa
    assert driver.read(pci_common.QUEUE_DEVICE + 4, 4) == 0
    assert driver.read(pci_common.QUEUE_ENABLE, 2) == 0
    assert driver.read(pci_common.QUEUE_NOTIFY_OFF, 2) == 0
    await driver.write(pci_common.QUEUE_ENABLE, 2, 1)
    assert driver.read(pci_common.QUEUE_ENABLE, 2) == 1


@pytest.mark.spec("4.1.4.3.1", "present 0 as queue_size of a queue that is unavailable")
async def test_a_queue_that_does_not_exist_has_size_0(rig: PciRig[RngDevice]) -> None:
    driver = rig.driver
    assert await driver.queue_size_max(1) == 0
    assert driver.read(pci_common.QUEUE_MSIX_VECTOR, 2) == pci_vectors.NO_VECTOR
    for field in (pci_common.QUEUE_SIZE, pci_common.QUEUE_MSIX_VECTOR, pci_common.QUEUE_ENABLE):
        await driver.write(field, 2, 1)
        assert driver.read(field, 2) in (0, pci_vectors.NO_VECTOR)
    await driver.write(pci_common.QUEUE_DESC, 8, 0x1000)
    assert driver.read(pci_common.QUEUE_DESC, 8) == 0


async def test_a_feature_bit_of_the_third_word_is_refused(rig: PciRig[RngDevice]) -> None:
    driver = rig.driver
    await driver.set_status(ACKNOWLEDGE | DRIVER)
    await driver.write_features(features.VERSION_1)
    await driver.write(pci_common.DRIVER_FEATURE_SELECT, 4, 2)
    await driver.write(pci_common.DRIVER_FEATURE, 4, 1)
    await driver.set_status(SET_UP)
    assert not driver.status() & FEATURES_OK


async def test_features_are_fixed_once_they_are_accepted(rig: PciRig[RngDevice]) -> None:
    await rig.driver.negotiate(features.VERSION_1)
    await rig.driver.write(pci_common.DRIVER_FEATURE, 4, 0)
    assert rig.driver.read(pci_common.DRIVER_FEATURE, 4) == 1
    await rig.driver.set_status(SET_UP | DRIVER_OK)
    assert rig.device.state.features == features.VERSION_1


async def test_a_queue_is_fixed_while_it_is_enabled(rig: PciRig[RngDevice]) -> None:
    driver, device_queue = rig.driver, rig.device.queues[0]
    await driver.start()
    await driver.write(pci_common.QUEUE_SELECT, 2, 0)
    before = (device_queue.size, device_queue.desc_gpa)
    await driver.write(pci_common.QUEUE_SIZE, 2, 2)
    await driver.write(pci_common.QUEUE_DESC, 8, 0x5000)
    await driver.set_status(SET_UP | DRIVER_OK)
    assert (device_queue.size, device_queue.desc_gpa) == before
    assert driver.read(pci_common.QUEUE_DESC, 8) == device_queue.desc_gpa


async def test_a_queue_costs_few_exits() -> None:
    async def many(context: DeviceContext) -> VirtioDevice:
        return Idle(context, 40)

    async with pci_rig(many) as rig:
        await rig.driver.start()
        assert len(rig.driver.queues) == 40
        rig.cpu.exits = 0
        await rig.driver.start()
        # Selecting, a vector, enabling; and one more of its entry in the table.
        assert rig.cpu.exits <= 40 * 4 + 20
        for index in range(40):
            rig.device.interrupts.queue(index).raise_used()
            assert await rig.driver.interrupted() == USED_BUFFER


async def test_a_driver_cannot_take_a_queue_away_but_by_a_reset(rig: PciRig[RngDevice]) -> None:
    await rig.driver.start()
    await rig.driver.write(pci_common.QUEUE_SELECT, 2, 0)
    await rig.driver.write(pci_common.QUEUE_ENABLE, 2, 0)
    assert rig.driver.read(pci_common.QUEUE_ENABLE, 2) == 1
    assert rig.device.ignored == 1


@pytest.mark.parametrize("vector", [2, 1000, 0xFFFE, pci_vectors.NO_VECTOR])
@pytest.mark.spec("4.1.5.1.2.1", "report a vector it cannot map by NO_VECTOR")
async def test_a_vector_that_does_not_exist_reads_back_as_none(
    rig: PciRig[RngDevice], vector: int
) -> None:
    driver = rig.driver
    for field in (pci_common.CONFIG_MSIX_VECTOR, pci_common.QUEUE_MSIX_VECTOR):
        await driver.write(field, 2, 1)
        assert driver.read(field, 2) == 1
        await driver.write(field, 2, vector)
        assert driver.read(field, 2) == pci_vectors.NO_VECTOR


@pytest.mark.spec("4.1.5.1.2.1", "have no event mapped to a vector after a reset")
async def test_a_reset_takes_the_vectors_back(rig: PciRig[RngDevice]) -> None:
    driver = rig.driver
    await driver.start()
    assert rig.device.interrupts.queue(0).fd == rig.transport.msix.fd(1)
    await driver.set_status(0)
    assert driver.read(pci_common.CONFIG_MSIX_VECTOR, 2) == pci_vectors.NO_VECTOR
    assert driver.read(pci_common.QUEUE_MSIX_VECTOR, 2) == pci_vectors.NO_VECTOR
    assert rig.device.interrupts.queue(0).fd == NO_FD


async def test_the_vectors_of_queue_and_configuration_are_apart(rig: PciRig[RngDevice]) -> None:
    await rig.driver.start()
    heard: list[int] = []
    rig.device.interrupts.queue(0).on_fd_change.append(heard.append)
    rig.device.set_config(b"\x01")
    assert await rig.driver.interrupted() == CONFIG_CHANGE
    rig.device.interrupts.queue(0).raise_used()
    assert await rig.driver.interrupted() == USED_BUFFER
    await rig.driver.write(pci_common.QUEUE_SELECT, 2, 0)
    await rig.driver.write(pci_common.QUEUE_MSIX_VECTOR, 2, 0)
    await rig.driver.config_write(rig.driver.control, 2, 0)
    assert heard == [rig.transport.msix.fd(0), NO_FD]


@pytest.mark.spec("4.1.4.5.1", "set ISR's configuration bit before it notifies of a change")
@pytest.mark.spec("4.1.4.5.1", "without MSI-X set ISR's queue bit before it notifies of use")
@pytest.mark.spec("4.1.4.5.1", "reset ISR status to 0 when the driver reads it")
async def test_without_msix_the_isr_tells_and_reading_clears_it(rig: PciRig[RngDevice]) -> None:
    await rig.driver.start()
    await rig.driver.config_write(rig.driver.control, 2, 0)
    isr = rig.driver.parts[pci.CFG_ISR][0]
    assert rig.cpu.read(isr, 1) == 0
    rig.driver.queues[0].offer(Segment(DATA_GPA, 32, writable=True))
    rig.driver.kick(0)
    await settle()
    rig.device.set_config(b"\x01")
    assert rig.cpu.read(isr, 1) == USED_BUFFER | CONFIG_CHANGE
    assert rig.cpu.read(isr, 1) == 0
    assert rig.device.statistics().interrupts == 0


async def test_each_queue_has_its_notification_where_the_bar_is(rig: PciRig[RngDevice]) -> None:
    driver, kick_fd = rig.driver, rig.device.queues[0].kick_fd
    assert rig.notifications.at == {driver.notify_gpa(0): kick_fd}
    await driver.config_write(header.BAR0, 8, HIGH.gpa)
    assert rig.notifications.at == {HIGH.gpa + pci.NOTIFY: kick_fd}
    await driver.config_write(header.COMMAND, 2, 0)
    assert rig.notifications.at == {}
    await driver.config_write(header.BAR0, 8, LOW.gpa)
    assert rig.notifications.at == {}
    await driver.config_write(header.COMMAND, 2, header.COMMAND_MEMORY)
    assert rig.notifications.at == {LOW.gpa + pci.NOTIFY: kick_fd}


async def test_notifications_follow_on_the_vcpus_thread_whichever_comes_first(
    rig: PciRig[RngDevice],
) -> None:
    function, kick_fd = rig.transport.function, rig.device.queues[0].kick_fd
    before = dict(rig.notifications.at)
    writes = [function.write(header.COMMAND, 2, value) for value in (0, header.COMMAND_MEMORY)]
    calls = [write for write in writes if isinstance(write, Call)]
    for call in calls:  # of two vCPUs, one after the other
        call.action()
        assert rig.notifications.at == before
    function.registers.put(header.BAR0, 8, HIGH.gpa)
    calls[1].action()
    for call in reversed(calls):
        assert call.after is not None
        call.after()
        assert rig.notifications.at == {HIGH.gpa + pci.NOTIFY: kick_fd}


async def test_a_place_that_kvm_refuses_costs_only_exits(rig: PciRig[RngDevice]) -> None:
    rig.notifications.at[HIGH.gpa + pci.NOTIFY] = 77
    await rig.driver.config_write(header.BAR0, 8, HIGH.gpa)
    assert rig.device.ignored == 1
    rig.driver.parts.clear()
    await rig.driver.start()
    head = rig.driver.queues[0].offer(Segment(DATA_GPA, 32, writable=True))
    await rig.cpu.write(rig.driver.notify_gpa(0), 2, 0)
    assert await rig.driver.used(0) == [(head, 32)]
    await rig.driver.config_write(header.BAR0, 8, LOW.gpa)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
async def test_a_notification_of_any_width_that_kvm_leaves_to_us(
    rig: PciRig[RngDevice], size: int
) -> None:
    await rig.driver.start()
    head = rig.driver.queues[0].offer(Segment(DATA_GPA, 32, writable=True))
    await rig.cpu.write(rig.driver.notify_gpa(0), size, 0)
    assert await rig.driver.used(0) == [(head, 32)]


async def test_a_notification_of_a_queue_that_is_off_is_ignored(rig: PciRig[RngDevice]) -> None:
    gpa = rig.driver.notify_gpa(0)
    await rig.cpu.write(gpa, 2, 0)
    await rig.driver.start()
    for at in (gpa + 1, gpa + 4, gpa + 0xFFC):
        await rig.cpu.write(at, 2, 0)
    assert rig.device.ignored == 4
    assert not rig.driver.status() & DEVICE_NEEDS_RESET


@pytest.mark.spec("4.1.4.9.1", "read the BAR as the capability says for a read of pci_cfg_data")
@pytest.mark.spec("4.1.4.9.1", "write the BAR as the capability says for a write of pci_cfg_data")
async def test_the_bar_is_reached_through_configuration_space(rig: PciRig[RngDevice]) -> None:
    driver = rig.driver
    at = rig.driver.capabilities()[-1][1]
    assert driver.config_read(at + 3, 1) == pci.CFG_PCI

    async def aim(offset: int, length: int, bar: int = 0) -> None:
        await driver.config_write(at + 4, 1, bar)
        await driver.config_write(at + 8, 4, offset)
        await driver.config_write(at + 12, 4, length)

    await aim(pci.COMMON + pci_common.NUM_QUEUES, 2)
    assert driver.config_read(at + 16, 2) == 1
    await aim(pci.COMMON + pci_common.DEVICE_STATUS, 1)
    await driver.config_write(at + 16, 1, ACKNOWLEDGE)
    assert driver.config_read(at + 16, 1) == ACKNOWLEDGE == driver.status()
    await aim(pci.TABLE + msix.ENTRY_CONTROL, 4)
    assert driver.config_read(at + 16, 4) == msix.ENTRY_MASKED
    for offset, length, bar, size in (
        (pci.COMMON + pci_common.NUM_QUEUES, 2, 1, 2),
        (pci.COMMON + pci_common.NUM_QUEUES, 2, 0, 4),
        (pci.COMMON + pci_common.NUM_QUEUES, 0, 0, 4),
        (pci.COMMON + 1, 2, 0, 2),
        (pci.BAR_BYTES, 4, 0, 4),
        (0xFFFF_FFFC, 4, 0, 4),
    ):
        await aim(offset, length, bar)
        assert driver.config_read(at + 16, size) == 0
        await driver.config_write(at + 16, size, 0xFF)
    assert driver.config_read(at + 17, 2) == 0


async def test_decoding_off_in_the_middle_of_work_loses_nothing(rig: PciRig[RngDevice]) -> None:
    driver = rig.driver
    await driver.start()
    head = driver.queues[0].offer(Segment(DATA_GPA, 32, writable=True))
    driver.kick(0)
    await driver.config_write(header.COMMAND, 2, 0)
    assert await driver.used(0) == [(head, 32)]
    assert driver.status() == 0xFF
    await driver.config_write(header.COMMAND, 2, header.COMMAND_MEMORY)
    assert driver.status() == SET_UP | DRIVER_OK


async def test_a_broken_ring_needs_a_reset_and_recovers_by_it(rig: PciRig[RngDevice]) -> None:
    driver = rig.driver
    await driver.start()
    driver.queues[0].offer_broken()
    driver.kick(0)
    assert await driver.interrupted() == CONFIG_CHANGE
    assert driver.status() & DEVICE_NEEDS_RESET
    await assert_fills(rig)


async def test_two_vcpus_may_reset_and_start_at_once(rig: PciRig[RngDevice]) -> None:
    await rig.driver.start()
    await asyncio.gather(*(rig.driver.set_status(value) for value in (0, SET_UP, 0, 0)))
    await assert_fills(rig)


async def test_closed_vectors_are_raised_no_more() -> None:
    async with pci_rig(lambda context: build(Rng(), context)) as rig:
        await rig.driver.start()
        before = set(os.listdir("/proc/self/fd"))
    assert rig.device.interrupts.queue(0).fd == NO_FD
    rig.device.set_config(b"\x01")
    assert len(set(os.listdir("/proc/self/fd"))) < len(before)


@pytest.mark.parametrize("seed", range(8))
async def test_no_access_raises_and_a_reset_always_helps(rig: PciRig[RngDevice], seed: int) -> None:
    source = random.Random(seed)
    parts = [(LOW.gpa + start, 0x48) for start in (pci.COMMON, pci.ISR, pci.DEVICE, pci.PBA)]
    parts += [(LOW.gpa + pci.TABLE, 0x28), (LOW.gpa + pci.NOTIFY, 0x10), (LOW.gpa, 0x10000)]
    parts += [(rig.driver.space, 0x100)] * 2
    for _ in range(3000):
        base, length = source.choice(parts)
        gpa = base + source.randrange(length)
        size = source.choice((1, 2, 2, 4, 4, 8))
        gpa = gpa & -size if source.random() < 0.8 else gpa
        value = source.choice((0, 1, 2, 4, 15, LOW.gpa, 0x8000, 2**64 - 1, source.getrandbits(64)))
        if source.random() < 0.4:
            assert 0 <= rig.cpu.read(gpa, size) < 1 << 8 * size
        else:
            await rig.cpu.write(gpa, size, value)
    await settle()
    await rig.driver.config_write(header.COMMAND, 2, 0)
    await rig.driver.config_write(header.BAR0, 8, LOW.gpa)
    await rig.driver.probe()
    await rig.driver.config_write(rig.driver.control, 2, 0)
    for fd in [rig.transport.msix.fd(vector) for vector in range(2)]:
        os.set_blocking(fd, False)
        os.eventfd_write(fd, 1)
        os.eventfd_read(fd)
    rig.device.interrupts.acknowledge(0xFFFF_FFFF)
    await assert_fills(rig)
