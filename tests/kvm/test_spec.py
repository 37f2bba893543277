"""What virtio 1.3 demands of a device, seen by tiny guests, on PCI and on MMIO.

The device is rng, and its driver uses one split ring of 8 entries, without interrupts.
"""

from __future__ import annotations

import pytest

from avmm.pci import function as header
from avmm.virtio.interrupt import CONFIG_CHANGE, USED_BUFFER
from avmm.virtio.state import ACKNOWLEDGE, DEVICE_NEEDS_RESET, DRIVER, DRIVER_OK
from kvm.guest_steps import (
    BUFFER,
    DEVICE_AREA,
    DRIVER_AREA,
    READY,
    REGISTERS,
    USED_IDX,
    Assemble,
    Guest,
    run,
)


@pytest.fixture(params=["mmio", "pci"])
def tiny(request: pytest.FixtureRequest) -> Guest:
    return Guest(request.param)


@pytest.mark.spec("2.2.2", "refuse FEATURES_OK with features it does not accept")
@pytest.mark.spec("2.4.1", "show status 0 after a reset")
@pytest.mark.spec("6.2", "offer VERSION_1")
async def test_features_are_offered_and_refused(tiny_guest: Assemble, tiny: Guest) -> None:
    tiny.see("status", 0)
    tiny.put("offered_select", 1)
    tiny.see("offered", 1, mask=1)
    for low, high in ((1, 1), (0, 3), (0, 0)):
        tiny.negotiate(low, high)
        tiny.see("status", ACKNOWLEDGE | DRIVER)
    tiny.negotiate()
    tiny.see("status", READY)
    tiny.put("status", 0)
    tiny.see("status", 0)
    await run(tiny_guest, tiny, rng=True)


@pytest.mark.spec(
    "2.1.2", "neither consume buffers nor send notifications of used ones before DRIVER_OK"
)
async def test_buffers_wait_for_driver_ok(tiny_guest: Assemble, tiny: Guest) -> None:
    tiny.negotiate()
    tiny.set_up_queue()
    tiny.offer(1)
    tiny.linger()
    tiny.expect(USED_IDX, "w", 0)
    tiny.expect(BUFFER, "l", 0)
    tiny.see("interrupts", 0)
    tiny.put("status", READY | DRIVER_OK)
    tiny.await_used(1)
    tiny.expect(DEVICE_AREA + 8, "l", 16)
    await run(tiny_guest, tiny, rng=True)


@pytest.mark.spec(
    "2.4.1", "neither notify nor touch the queues after a reset, until it is set up again"
)
async def test_after_a_reset_nothing_is_touched(tiny_guest: Assemble, tiny: Guest) -> None:
    tiny.start()
    tiny.offer(1)
    tiny.await_used(1)
    tiny.put("status", 0)
    tiny.see("status", 0)
    tiny.see("interrupts", 0)
    tiny.store(BUFFER, "l", 0)
    tiny.offer(2)
    tiny.linger()
    tiny.expect(USED_IDX, "w", 1)
    tiny.expect(BUFFER, "l", 0)
    tiny.see("interrupts", 0)
    tiny.see("queue_ready", 0)
    await run(tiny_guest, tiny, rng=True)


@pytest.mark.spec(
    "2.1.2", "notify of a configuration change after it set DEVICE_NEEDS_RESET under DRIVER_OK"
)
async def test_a_broken_ring_is_told_and_mended(tiny_guest: Assemble, tiny: Guest) -> None:
    tiny.start()
    tiny.offer(1, head=8)
    gpa, size = tiny.places["status"]
    tiny.text += f"broken: mov ${gpa:#x}, %ebx\nmov{size} (%rbx), {REGISTERS[size]}\n"
    tiny.text += f"test ${DEVICE_NEEDS_RESET}, %al\njz broken\n"
    gpa, size = tiny.places["interrupts"]
    tiny.text += f"told: mov ${gpa:#x}, %ebx\nmov{size} (%rbx), {REGISTERS[size]}\n"
    tiny.text += f"cmp ${CONFIG_CHANGE}, %al\njne told\n"
    for address in (DRIVER_AREA, DEVICE_AREA):
        tiny.store(address, "l", 0)
    tiny.start()
    tiny.see("status", READY | DRIVER_OK)
    tiny.offer(1)
    tiny.await_used(1)
    await run(tiny_guest, tiny, rng=True)


def await_interrupt_status(tiny: Guest) -> None:
    """The index comes before the interrupt that tells of it."""
    gpa, size = tiny.places["interrupts" if tiny.transport == "mmio" else "function_status"]
    bit = USED_BUFFER if tiny.transport == "mmio" else header.STATUS_INTERRUPT
    tiny.text += f"came: mov ${gpa:#x}, %ebx\nmov{size} (%rbx), {REGISTERS[size]}\n"
    tiny.text += f"test ${bit:#x}, %al\njz came\n"


@pytest.mark.spec("4.2.2.1", "return 0x74726976 as MagicValue")
@pytest.mark.spec("4.2.2.1", "return 2 as Version")
@pytest.mark.spec("4.2.2.1", "show each event in InterruptStatus until the driver acknowledges it")
async def test_an_mmio_device_shows_events_until_acknowledged(tiny_guest: Assemble) -> None:
    tiny = Guest("mmio")
    tiny.see("magic", 0x74726976)
    tiny.see("version", 2)
    tiny.start()
    tiny.offer(1)
    tiny.await_used(1)
    await_interrupt_status(tiny)
    for mask, left in ((CONFIG_CHANGE, USED_BUFFER), (USED_BUFFER, 0)):
        tiny.put("acknowledge", mask)
        tiny.see("interrupts", left)
    await run(tiny_guest, tiny, rng=True)


@pytest.mark.spec("4.1.4.5.1", "without MSI-X set ISR's queue bit before it notifies of use")
@pytest.mark.spec("4.1.4.5.1", "without MSI-X set Interrupt Status to the or of the bits of ISR")
@pytest.mark.spec("4.1.4.5.1", "reset ISR status to 0 when the driver reads it")
async def test_a_pci_device_shows_events_until_the_isr_is_read(tiny_guest: Assemble) -> None:
    tiny = Guest("pci")
    tiny.see("function_status", 0x10)
    tiny.start()
    tiny.see("function_status", 0x10)
    tiny.offer(1)
    tiny.await_used(1)
    await_interrupt_status(tiny)
    tiny.see("function_status", 0x10 | header.STATUS_INTERRUPT)
    tiny.see("interrupts", USED_BUFFER)
    tiny.see("interrupts", 0)
    tiny.see("function_status", 0x10)
    await run(tiny_guest, tiny, rng=True)
