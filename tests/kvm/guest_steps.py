"""The text of tiny guests that drive a virtio device, on PCI or on MMIO: split rings of 8 entries,
without interrupts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import avmm
from avmm.mem import layout
from avmm.pci import function as header
from avmm.virtio.state import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK
from avmm.virtio.transport import mmio, pci, pci_common

Assemble = Callable[[str], Path]
Transport = Literal["mmio", "pci"]

SPACE = layout.PCI_ECAM + (1 << 15)
COMMON, SLOT = layout.PCI_MEMORY + pci.COMMON, int(layout.VIRTIO_MMIO)
READY = ACKNOWLEDGE | DRIVER | FEATURES_OK
DESC, DRIVER_AREA, DEVICE_AREA, BUFFER = 0x300000, 0x301000, 0x302000, 0x303000
QUEUE_BYTES = 0x10000
"""From what belongs to a queue to what belongs to the next one: the four above are the first's."""
USED_IDX = DEVICE_AREA + 2

MMIO = {
    "magic": (SLOT + mmio.MAGIC_VALUE, "l"),
    "version": (SLOT + mmio.VERSION, "l"),
    "offered_select": (SLOT + mmio.DEVICE_FEATURES_SEL, "l"),
    "offered": (SLOT + mmio.DEVICE_FEATURES, "l"),
    "accepted_select": (SLOT + mmio.DRIVER_FEATURES_SEL, "l"),
    "accepted": (SLOT + mmio.DRIVER_FEATURES, "l"),
    "status": (SLOT + mmio.STATUS, "l"),
    "queue_select": (SLOT + mmio.QUEUE_SEL, "l"),
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
    "queue_select": (COMMON + pci_common.QUEUE_SELECT, "w"),
    "queue_size": (COMMON + pci_common.QUEUE_SIZE, "w"),
    "queue_ready": (COMMON + pci_common.QUEUE_ENABLE, "w"),
    "desc": (COMMON + pci_common.QUEUE_DESC, "l"),
    "driver": (COMMON + pci_common.QUEUE_DRIVER, "l"),
    "device": (COMMON + pci_common.QUEUE_DEVICE, "l"),
    "notify": (layout.PCI_MEMORY + pci.NOTIFY, "w"),
    "interrupts": (layout.PCI_MEMORY + pci.ISR, "b"),
}
_HANG_S = 60
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

    def await_used(self, idx: int, *, queue: int = 0) -> None:
        self._labels += 1
        self.text += f"used{self._labels}: mov ${USED_IDX + queue * QUEUE_BYTES:#x}, %ebx\n"
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

    def set_up_queue(self, queue: int = 0) -> None:
        self.put("queue_select", queue)
        self.put("queue_size", 8)
        for name, gpa in (("desc", DESC), ("driver", DRIVER_AREA), ("device", DEVICE_AREA)):
            self.put(name, gpa + queue * QUEUE_BYTES)
        self.put("queue_ready", 1)

    def start(self, queues: int = 1) -> None:
        self.negotiate()
        for queue in range(queues):
            self.set_up_queue(queue)
        self.put("status", READY | DRIVER_OK)

    def offer(
        self,
        idx: int,
        head: int = 0,
        *,
        queue: int = 0,
        buffer: int = BUFFER,
        size_bytes: int = 16,
        writable: bool = True,
    ) -> None:
        """The buffer, as descriptor 0, and as available element idx - 1; a notification."""
        base = queue * QUEUE_BYTES
        for at, value in ((0, buffer), (4, 0), (8, size_bytes), (12, 2 if writable else 0)):
            self.store(base + DESC + at, "l", value)
        self.store(base + DRIVER_AREA + 4 + 2 * ((idx - 1) % 8), "w", head)
        self.store(base + DRIVER_AREA + 2, "w", idx)
        self.notify(queue)

    def notify(self, queue: int) -> None:
        """Each queue has a place of its own on PCI."""
        gpa, size = self.places["notify"]
        place = pci.NOTIFY_OFF_MULTIPLIER * queue if self.transport == "pci" else 0
        self.store(gpa + place, size, queue)


async def run(tiny_guest: Assemble, tiny: Guest, **devices: Any) -> None:
    """All that the guest expected was so. devices: fields of Config."""
    config = avmm.Config(
        kernel=str(tiny_guest(tiny.text + LAST)),
        memory="4M",
        cmdline="",
        transport=tiny.transport,
        **devices,
    )
    async with avmm.MicroVM(config) as vm:
        async with asyncio.timeout(_HANG_S):
            await vm.wait()
        assert vm.console.scrollback == b"y"
