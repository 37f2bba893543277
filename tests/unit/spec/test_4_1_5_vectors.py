"""MSI-X vectors of virtio over PCI (virtio 1.3 section 4.1.5)."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from avmm.virtio.device import VirtioDevice
from avmm.virtio.devices.rng import RNG
from avmm.virtio.devtype import DeviceContext
from avmm.virtio.transport import pci_common
from fakes.pci_driver import PciRig, pci_rig

NO_VECTOR = 0xFFFF
QUEUES = 5


class Idle(VirtioDevice):
    """Has queues, and serves none."""

    def __init__(self, context: DeviceContext) -> None:
        super().__init__(RNG, context, offered=0, queue_sizes=(8,) * QUEUES)

    def kick(self, index: int) -> bool:
        self.queues[index].take_kick()
        return False


async def idle(context: DeviceContext) -> Idle:
    return Idle(context)


@pytest.fixture
async def rig() -> AsyncIterator[PciRig[Idle]]:
    async with pci_rig(idle) as rig:
        await rig.driver.start()
        yield rig
        assert rig.errors == []


async def map_event(rig: PciRig[Idle], event: int | None, vector: int) -> int:
    """Of a queue, or of the configuration when None; what reads back."""
    field = pci_common.CONFIG_MSIX_VECTOR
    if event is not None:
        await rig.driver.write(pci_common.QUEUE_SELECT, 2, event)
        field = pci_common.QUEUE_MSIX_VECTOR
    await rig.driver.write(field, 2, vector)
    return rig.driver.read(field, 2)


def happen(rig: PciRig[Idle], event: int | None) -> list[int]:
    """Let the event take place; the vectors whose messages came."""
    if event is None:
        rig.device.set_config(b"new")
    else:
        rig.device.interrupts.queue(event).raise_used()
    messages = [rig.messages.sent(fd) for fd in tuple(rig.messages.connected)]
    return [data - 0x4041 for _, data in filter(None, messages)]


EVENTS = [None, *range(QUEUES)]


@pytest.mark.spec("4.1.5.1.2.1", "report the number of its vectors as the MSI-X Table Size")
@pytest.mark.spec("4.1.5.1.2.1", "let any event be mapped to any vector of the table")
@pytest.mark.spec("4.1.5.1.2.1", "return the vector an event is mapped to, NO_VECTOR if unmapped")
async def test_any_event_goes_to_any_vector(rig: PciRig[Idle]) -> None:
    assert rig.driver.vectors == QUEUES + 1
    for event in EVENTS:
        for vector in range(rig.driver.vectors):
            assert await map_event(rig, event, vector) == vector
            assert happen(rig, event) == [vector]
        assert await map_event(rig, event, rig.driver.vectors) == NO_VECTOR


@pytest.mark.spec("4.1.5.1.2.1", "let any event be unmapped")
@pytest.mark.spec("4.1.5.3.1", "with MSI-X not interrupt for a queue that has NO_VECTOR")
@pytest.mark.spec("4.1.5.4.1", "with MSI-X not interrupt for changes if their vector is NO_VECTOR")
async def test_an_event_without_a_vector_interrupts_nobody(rig: PciRig[Idle]) -> None:
    for event in EVENTS:
        assert await map_event(rig, event, NO_VECTOR) == NO_VECTOR
        assert happen(rig, event) == []
    for event in EVENTS:
        assert await map_event(rig, event, 1) == 1
        assert happen(rig, event) == [1]


@pytest.mark.spec("4.1.5.1.2.1", "have no event mapped to a vector after a reset")
async def test_a_reset_unmaps_every_event(rig: PciRig[Idle]) -> None:
    await rig.driver.set_status(0)
    assert rig.driver.read(pci_common.CONFIG_MSIX_VECTOR, 2) == NO_VECTOR
    for index in range(QUEUES):
        await rig.driver.write(pci_common.QUEUE_SELECT, 2, index)
        assert rig.driver.read(pci_common.QUEUE_MSIX_VECTOR, 2) == NO_VECTOR


@pytest.mark.spec("4.1.5.1.2.1", "report a vector it cannot map by NO_VECTOR")
@pytest.mark.parametrize("vector", [QUEUES + 1, 0x7FF, 0x800, 0xFFFE])
async def test_a_mapping_that_fails_reads_back_as_none(rig: PciRig[Idle], vector: int) -> None:
    for event in EVENTS:
        assert await map_event(rig, event, vector) == NO_VECTOR
        assert happen(rig, event) == []
