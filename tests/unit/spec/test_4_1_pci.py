"""Virtio over PCI: identity, capabilities, structures (virtio 1.3 sections 4.1.2 to 4.1.4)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from avmm.pci import function as header
from avmm.virtio import features
from avmm.virtio.devices.rng import Rng, RngDevice, build
from avmm.virtio.interrupt import CONFIG_CHANGE, USED_BUFFER
from avmm.virtio.state import ACKNOWLEDGE, DRIVER, FEATURES_OK
from avmm.virtio.transport import pci, pci_common
from fakes.driver_queue import Segment
from fakes.every_device import EVERY
from fakes.mmio_driver import settle
from fakes.pci_driver import PciDriver, PciRig, pci_rig
from fakes.virtio_rig import DATA_GPA

VENDOR = 0x1AF4
BAR_TYPE_64_BIT = 0b100
EXTRA_BYTES = {
    pci.CFG_COMMON: 0,
    pci.CFG_NOTIFY: 4,
    pci.CFG_ISR: 0,
    pci.CFG_DEVICE: 0,
    pci.CFG_PCI: 4,
}
"""After struct virtio_pci_cap, of each type."""
GENERATION = "show another config_generation after a driver read a value that changed"
QUEUE_SIZE = "present 0 or a power of 2 as queue_size, if RING_PACKED is not negotiated"


@dataclass(frozen=True)
class Capability:
    """A struct virtio_pci_cap as a driver reads it. at: in configuration space."""

    at: int
    cap_len: int
    cfg_type: int
    bar: int
    offset: int
    length: int


def capabilities(driver: PciDriver) -> list[Capability]:
    read = driver.config_read
    return [
        Capability(
            at, read(at + 2, 1), read(at + 3, 1), read(at + 4, 1), read(at + 8, 4), read(at + 12, 4)
        )
        for kind, at in driver.capabilities()
        if kind == pci.VENDOR_CAPABILITY_ID
    ]


def of_type(driver: PciDriver, cfg_type: int) -> list[Capability]:
    return [found for found in capabilities(driver) if found.cfg_type == cfg_type]


@pytest.fixture
async def rig() -> AsyncIterator[PciRig[RngDevice]]:
    async with pci_rig(lambda context: build(Rng(), context)) as rig:
        await rig.driver.probe()
        yield rig
        assert rig.errors == []


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.spec("4.1.2.1", "have the PCI vendor id 0x1AF4")
@pytest.mark.spec("4.1.2.1", "have a PCI device id of 0x1040 and the virtio device id")
async def test_every_device_is_recognized(name: str) -> None:
    async with pci_rig(EVERY[name]) as rig:
        assert rig.driver.config_read(header.VENDOR_ID, 2) == VENDOR
        device_id = rig.driver.config_read(header.DEVICE_ID, 2)
        assert device_id == 0x1040 + rig.device.device_type.virtio_id
        assert rig.driver.config_read(header.REVISION_ID, 1) >= 1


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.spec("4.1.4.2", "count a capability's extra data in cap_len")
@pytest.mark.spec("4.1.4.3.1", "align the common configuration to 4 bytes")
@pytest.mark.spec("4.1.4.3.1", "present a common configuration capability")
@pytest.mark.spec("4.1.4.4.1", "present a notification capability")
@pytest.mark.spec("4.1.4.4.1", "align notifications to 2 bytes")
@pytest.mark.spec("4.1.4.4.1", "have a notify_off_multiplier of 0 or an even power of 2")
@pytest.mark.spec("4.1.4.5.1", "present an ISR capability")
@pytest.mark.spec("4.1.4.6", "present a device configuration capability if it has a configuration")
@pytest.mark.spec("4.1.4.6.1", "align the device configuration to 4 bytes")
@pytest.mark.spec("4.1.4.9.1", "present a PCI configuration access capability")
async def test_every_structure_has_a_sound_capability(name: str) -> None:
    async with pci_rig(EVERY[name]) as rig:
        driver = rig.driver
        await driver.probe()
        found = capabilities(driver)
        kinds = {pci.CFG_COMMON, pci.CFG_NOTIFY, pci.CFG_ISR, pci.CFG_PCI}
        kinds |= {pci.CFG_DEVICE} if name != "rng" else set()
        assert {capability.cfg_type for capability in found} == kinds
        assert driver.config_read(header.BAR0, 1) & 0xF == BAR_TYPE_64_BIT
        ends = sorted(at for _, at in driver.capabilities())
        for capability in found:
            assert capability.cap_len == 16 + EXTRA_BYTES[capability.cfg_type]
            assert not any(capability.at < at < capability.at + capability.cap_len for at in ends)
            assert capability.bar == 0
            assert capability.offset + capability.length <= pci.BAR_BYTES
            if capability.cfg_type in (pci.CFG_COMMON, pci.CFG_DEVICE):
                assert capability.offset % 4 == 0
            elif capability.cfg_type == pci.CFG_NOTIFY:
                assert capability.offset % 2 == 0
                assert driver.config_read(capability.at + 16, 4) in (0, 4, 16, 64, 256, 1024)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.spec("4.1.4.4.1", "have room for 2 bytes of notification at least")
@pytest.mark.spec("4.1.4.4.1", "have room for the notifications of all queues")
async def test_every_queues_notification_lies_in_the_capability(name: str) -> None:
    async with pci_rig(EVERY[name]) as rig:
        await rig.driver.probe()
        (notify,) = of_type(rig.driver, pci.CFG_NOTIFY)
        multiplier = rig.driver.config_read(notify.at + 16, 4)
        queues = rig.driver.read(pci_common.NUM_QUEUES, 2)
        assert queues == len(rig.device.queues)
        assert notify.length >= 2
        for index in range(queues):
            assert await rig.driver.queue_size_max(index) > 0
            offset = rig.driver.read(pci_common.QUEUE_NOTIFY_OFF, 2)
            assert notify.length >= offset * multiplier + 2


@pytest.mark.spec(
    "4.1.3.2", "let each half of a 64-bit field of the configuration be accessed alone"
)
async def test_halves_of_a_64_bit_field_are_read_alone() -> None:
    async with pci_rig(EVERY["vsock"]) as rig:
        await rig.driver.probe()
        rig.device.set_config((0x1122_3344_5566_7788).to_bytes(8, "little"))
        at = rig.driver.parts[pci.CFG_DEVICE][0]
        assert rig.cpu.read(at + 4, 4) == 0x1122_3344
        assert rig.cpu.read(at, 4) == 0x5566_7788
        assert rig.cpu.read(at + 4, 4) == 0x1122_3344


@pytest.mark.spec(
    "4.1.4.3.1", "present the feature bits offered from 32 * device_feature_select on"
)
async def test_features_are_shown_by_the_word_selected(rig: PciRig[RngDevice]) -> None:
    driver, offered = rig.driver, rig.device.state.offered
    for select in (1, 0, 2, 3, 1, 0xFFFF_FFFF, 0, 1 << 31):
        await driver.write(pci_common.DEVICE_FEATURE_SELECT, 4, select)
        expected = offered >> 32 * select & 0xFFFF_FFFF if select < 8 else 0
        assert driver.read(pci_common.DEVICE_FEATURE, 4) == expected


@pytest.mark.spec("4.1.4.3.1", "present the valid bits written from 32 * driver_feature_select on")
async def test_the_drivers_features_read_back_by_the_word_selected(
    rig: PciRig[RngDevice],
) -> None:
    driver = rig.driver
    wanted = features.VERSION_1 | features.RING_PACKED | features.RING_EVENT_IDX
    await driver.set_status(ACKNOWLEDGE | DRIVER)
    await driver.write_features(wanted)
    for _ in range(2):
        for select, expected in ((0, wanted & 0xFFFF_FFFF), (1, wanted >> 32), (7, 0)):
            await driver.write(pci_common.DRIVER_FEATURE_SELECT, 4, select)
            assert driver.read(pci_common.DRIVER_FEATURE, 4) == expected
        await driver.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)


@pytest.mark.spec("4.1.4.3.1", GENERATION)
@pytest.mark.parametrize("changes", [1, 255, 256, 257, 512, 65536])
async def test_no_number_of_changes_passes_for_none(rig: PciRig[RngDevice], changes: int) -> None:
    async with pci_rig(EVERY["vsock"]) as rig:
        driver = rig.driver
        await driver.start()
        for _ in range(3):
            before = driver.config_generation()
            driver.read_config(0, 4)
            for count in range(changes):
                rig.device.set_config(count.to_bytes(8, "little"), notify=False)
            driver.read_config(4, 4)
            assert driver.config_generation() != before


@pytest.mark.spec("4.1.4.3.1", GENERATION)
async def test_the_generation_rests_while_nothing_changes() -> None:
    async with pci_rig(EVERY["vsock"]) as rig:
        await rig.driver.start()
        before = rig.driver.config_generation()
        for _ in range(5):
            rig.driver.read_config(0, 4)
            assert rig.driver.config_generation() == before


@pytest.mark.spec("4.1.4.3.1", "reset when 0 is written to device_status, and present 0 when done")
@pytest.mark.spec("4.1.4.3.1", "present 0 as queue_enable on reset")
async def test_a_reset_shows_in_the_common_configuration() -> None:
    async with pci_rig(EVERY["ports"]) as rig:
        driver = rig.driver
        await driver.start()
        sizes = [await driver.queue_size_max(index) for index in range(len(driver.queues))]
        assert all(queue.ready for queue in rig.device.queues)
        await driver.set_status(0)
        assert driver.status() == 0
        assert rig.device.state.features == 0
        for index in range(len(driver.queues)):
            assert await driver.queue_size_max(index) >= sizes[index]
            assert driver.read(pci_common.QUEUE_ENABLE, 2) == 0


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.spec("4.1.4.3.1", "present 0 as queue_size of a queue that is unavailable")
@pytest.mark.spec("4.1.4.3.1", QUEUE_SIZE)
async def test_queue_sizes_are_powers_of_2_and_0_past_the_last(name: str) -> None:
    async with pci_rig(EVERY[name]) as rig:
        await rig.driver.probe()
        queues = rig.driver.read(pci_common.NUM_QUEUES, 2)
        assert await rig.driver.read_features() & features.RING_PACKED
        for accepted in (None, features.VERSION_1):
            if accepted is not None:
                assert await rig.driver.negotiate(accepted)
            for index in range(queues):
                size = await rig.driver.queue_size_max(index)
                assert size.bit_count() == 1
            for index in (queues, queues + 1, 0x7FFF, 0xFFFF):
                assert await rig.driver.queue_size_max(index) == 0


@pytest.mark.spec("4.1.4.5.1", "without MSI-X set Interrupt Status to the or of the bits of ISR")
async def test_interrupt_status_of_the_function_follows_the_isr(rig: PciRig[RngDevice]) -> None:
    driver = rig.driver
    isr = driver.parts[pci.CFG_ISR][0]

    def interrupting() -> bool:
        words = [
            driver.config_read(header.STATUS, 2),
            driver.config_read(header.STATUS, 1),
            driver.config_read(header.COMMAND, 4) >> 16,
            driver.config_read(header.COMMAND, 8) >> 16 & 0xFFFF,
        ]
        shown = {bool(word & header.STATUS_INTERRUPT) for word in words}
        assert len(shown) == 1
        assert all(word & 0x10 for word in words)  # there are capabilities
        return shown.pop()

    assert not interrupting()
    await driver.start()
    await driver.config_write(driver.control, 2, 0)
    assert not interrupting()
    driver.queues[0].offer(Segment(DATA_GPA, 32, writable=True))
    driver.kick(0)
    while not driver.queues[0].take_used():
        await settle()
    assert interrupting()
    rig.device.set_config(b"new")
    assert interrupting()
    assert rig.cpu.read(isr, 1) == USED_BUFFER | CONFIG_CHANGE
    assert not interrupting()
    rig.device.set_config(b"newer")
    assert interrupting()
    await driver.enable_msix()
    assert not interrupting()  # messages tell it
    await driver.config_write(driver.control, 2, 0)
    assert interrupting()
    await driver.set_status(0)
    assert not interrupting()


async def test_the_status_costs_no_exit_but_of_a_live_device_without_msix(
    rig: PciRig[RngDevice],
) -> None:
    driver = rig.driver

    def exits() -> int:
        before = rig.cpu.exits
        driver.config_read(header.STATUS, 2)
        return rig.cpu.exits - before

    assert exits() == 0
    await driver.start()
    assert exits() == 0
    await driver.config_write(driver.control, 2, 0)
    assert exits() == 1
    await driver.set_status(0)
    assert exits() == 0
