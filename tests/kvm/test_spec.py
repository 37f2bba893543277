"""What virtio 1.3 demands of a device, seen by tiny guests, on PCI and on MMIO.

The device is rng, and its driver uses one split ring of 8 entries, without interrupts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

import avmm
from avmm.mem import layout
from avmm.pci import function as header
from avmm.virtio.interrupt import CONFIG_CHANGE, USED_BUFFER
from avmm.virtio.state import ACKNOWLEDGE, DEVICE_NEEDS_RESET, DRIVER, DRIVER_OK, FEATURES_OK
from avmm.virtio.transport import mmio, pci, pci_common

Assemble = Callable[[str], Path]
Transport = Literal["mmio", "pci"]

SPACE = layout.PCI_ECAM + (1 << 15)
COMMON, SLOT = layout.PCI_MEMORY + pci.COMMON, int(layout.VIRTIO_MMIO)
READY = ACKNOWLEDGE | DRIVER | FEATURES_OK
DESC, DRIVER_AREA, DEVICE_AREA, BUFFER = 0x300000, 0x301000, 0x302000, 0x303000
USED_IDX = DEVICE_AREA + 2

MMIO = {
    "magic": (SLOT + mmio.MAGIC_VALUE, "l"),
    "version": (SLOT + mmio.VERSION, "l"),
    "offered_select": (SLOT + mmio.DEVICE_FEATURES_SEL, "l"),
    "offered": (SLOT + mmio.DEVICE_FEATURES, "l"),
    "accepted_select": (SLOT + mmio.DRIVER_FEATURES_SEL, "l"),
    "accepted": (SLOT + mmio.DRIVER_FEATURES, "l"),
    "status": (SLOT + mmio.STATUS, "l"),
    "queue_size": (SLOT + mmio.QUEUE_SIZE, "l"),
    "queue_ready": (SLOT + mmio.QUEUE_READY, "l"),
    "desc": (SLOT + mmio.QUEUE_DESC_LOW, "l"),
    "driver": (SLOT + mmio.QUEUE_DRIVER_LOW, "l"),
    "device": (SLOT + mmio.QUEUE_DEVICE_LOW, "l"),
    "notify": (SLOT + mmio.QUEUE_NOTIFY, "l"),
    "interrupts": (SLOT + mmio.INTERRUPT_STATUS, "l"),
    "acknowledge": (SLOT + mmio.INTERRUPT_ACK, "l"),
}
PCI = {
    "function_status": (SPACE + header.STATUS, "w"),
    "command": (SPACE + header.COMMAND, "w"),
    "offered_select": (COMMON + pci_common.DEVICE_FEATURE_SELECT, "l"),
    "offered": (COMMON + pci_common.DEVICE_FEATURE, "l"),
    "accepted_select": (COMMON + pci_common.DRIVER_FEATURE_SELECT, "l"),
    "accepted": (COMMON + pci_common.DRIVER_FEATURE, "l"),
    "status": (COMMON + pci_common.DEVICE_STATUS, "b"),
    "queue_size": (COMMON + pci_common.QUEUE_SIZE, "w"),
    "queue_ready": (COMMON + pci_common.QUEUE_ENABLE, "w"),
    "desc": (COMMON + pci_common.QUEUE_DESC, "l"),
    "driver": (COMMON + pci_common.QUEUE_DRIVER, "l"),
    "device": (COMMON + pci_common.QUEUE_DEVICE, "l"),
    "notify": (layout.PCI_MEMORY + pci.NOTIFY, "w"),
    "interrupts": (layout.PCI_MEMORY + pci.ISR, "b"),
}
REGISTERS = {"b": "%al", "w": "%ax", "l": "%eax"}
LAST = """
    putc 'y'
    poweroff
fail:
    putc 'n'
    poweroff
"""


class Guest:
    """The text of a guest, a step a call."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.places = MMIO if transport == "mmio" else PCI
        self.text = ""
        self._labels = 0
        if transport == "pci":
            self.put("command", header.COMMAND_MEMORY | 4)

    def store(self, gpa: int, size: str, value: int) -> None:
        self.text += f"mov ${gpa:#x}, %ebx\nmov{size} ${value:#x}, (%rbx)\n"

    def expect(self, gpa: int, size: str, value: int, mask: int = -1) -> None:
        register = REGISTERS[size]
        self.text += f"mov ${gpa:#x}, %ebx\nmov{size} (%rbx), {register}\n"
        if mask != -1:
            self.text += f"and ${mask:#x}, {register}\n"
        self.text += f"cmp ${value:#x}, {register}\njne fail\n"

    def put(self, name: str, value: int) -> None:
        gpa, size = self.places[name]
        self.store(gpa, size, value)

    def see(self, name: str, value: int, mask: int = -1) -> None:
        gpa, size = self.places[name]
        self.expect(gpa, size, value, mask)

    def await_used(self, idx: int) -> None:
        self._labels += 1
        self.text += f"used{self._labels}: mov ${USED_IDX:#x}, %ebx\n"
        self.text += f"movw (%rbx), %ax\ncmp ${idx}, %ax\njne used{self._labels}\n"

    def linger(self) -> None:
        """Time for a device that would do what it must not: exits, one after the other."""
        self._labels += 1
        gpa, size = self.places["status"]
        self.text += f"mov $300, %ecx\nlinger{self._labels}: mov ${gpa:#x}, %ebx\n"
        self.text += f"mov{size} (%rbx), {REGISTERS[size]}\ndec %ecx\njnz linger{self._labels}\n"

    def negotiate(self, low: int = 0, high: int = 1) -> None:
        """From reset to FEATURES_OK, with VERSION_1 only."""
        self.put("status", 0)
        self.put("status", ACKNOWLEDGE | DRIVER)
        for select, word in enumerate((low, high)):
            self.put("accepted_select", select)
            self.put("accepted", word)
        self.put("status", READY)

    def set_up_queue(self) -> None:
        self.put("queue_size", 8)
        for name, gpa in (("desc", DESC), ("driver", DRIVER_AREA), ("device", DEVICE_AREA)):
            self.put(name, gpa)
        self.put("queue_ready", 1)

    def start(self) -> None:
        self.negotiate()
        self.set_up_queue()
        self.put("status", READY | DRIVER_OK)

    def offer(self, idx: int, head: int = 0) -> None:
        """The buffer, as descriptor 0, and as available element idx - 1; a notification."""
        for gpa, value in ((DESC, BUFFER), (DESC + 4, 0), (DESC + 8, 16), (DESC + 12, 2)):
            self.store(gpa, "l", value)
        self.store(DRIVER_AREA + 4 + 2 * (idx - 1), "w", head)
        self.store(DRIVER_AREA + 2, "w", idx)
        self.put("notify", 0)


@pytest.fixture(params=["mmio", "pci"])
def tiny(request: pytest.FixtureRequest) -> Guest:
    return Guest(request.param)


async def run(tiny_guest: Assemble, tiny: Guest) -> None:
    """All that the guest expected was so."""
    config = avmm.Config(
        kernel=str(tiny_guest(tiny.text + LAST)),
        memory="4M",
        cmdline="",
        rng=True,
        transport=tiny.transport,
    )
    async with avmm.MicroVM(config) as vm:
        await vm.wait()
        assert vm.console.scrollback == b"y"


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
    await run(tiny_guest, tiny)


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
    await run(tiny_guest, tiny)


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
    await run(tiny_guest, tiny)


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
    await run(tiny_guest, tiny)


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
    await run(tiny_guest, tiny)


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
    await run(tiny_guest, tiny)
