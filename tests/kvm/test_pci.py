"""PCI on KVM: configuration space both ways, BARs, messages on vectors, notifications.

The guest finds its one device, rng, where it is left at the start: number 1 of bus 0.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import avmm
from avmm.kvm.system import Kvm
from avmm.mem import layout
from avmm.pci import function as header
from avmm.virtio.device import VirtioDevice
from avmm.virtio.transport import pci, pci_common

Assemble = Callable[[str], Path]

SPACE = layout.PCI_ECAM + (1 << 15)
BAR = layout.PCI_MEMORY
MSIX = SPACE + 0x40

MACROS = f"""
.macro peek size, at, register       /* a load of MMIO */
    mov $\\at, %ebx
    mov\\size (%rbx), \\register
.endm
.macro poke size, at, value
    mov $\\at, %ebx
    mov\\size $\\value, (%rbx)
.endm
.macro expect register, value
    cmp $\\value, \\register
    jne fail
.endm
.macro select address
    mov $\\address, %eax
    mov $0xcf8, %dx
    out %eax, %dx
.endm
.set SPACE, {SPACE:#x}
.set BAR, {BAR:#x}
.set MSIX, {MSIX:#x}
.set COMMAND, SPACE + {header.COMMAND}
.set COMMON, BAR + {pci.COMMON}
.set NOTIFY, BAR + {pci.NOTIFY}
.set TABLE, BAR + {pci.TABLE}
.set PBA, BAR + {pci.PBA}
"""

END = """
    putc 'y'
    poweroff
fail:
    putc 'n'
    poweroff
"""


@asynccontextmanager
async def guest(tiny_guest: Assemble, body: str) -> AsyncIterator[avmm.MicroVM]:
    kernel = tiny_guest(MACROS + body)
    config = avmm.Config(kernel=str(kernel), memory="4M", cmdline="", rng=True)
    async with avmm.MicroVM(config) as vm:
        yield vm


def device_of(vm: avmm.MicroVM) -> VirtioDevice:
    assert vm._machine is not None
    return vm._machine.devices["rng0"]


async def test_configuration_space_is_the_same_both_ways(tiny_guest: Assemble) -> None:
    body = """
    select 0x80000800
    mov $0xcfc, %dx
    in %dx, %eax
    expect %eax, 0x10441af4
    mov $0xcfe, %dx
    in %dx, %ax
    expect %ax, 0x1044
    mov $0xcfd, %dx
    in %dx, %al
    expect %al, 0x1a
    mov $0xcf8, %dx
    in %dx, %eax
    expect %eax, 0x80000800
    mov $0xcf9, %dx                  /* no address register has this size */
    in %dx, %al
    expect %al, 0xff
    peek l, SPACE, %eax
    expect %eax, 0x10441af4
    peek l, SPACE + 1, %eax
    expect %eax, 0x0010441a
    peek w, SPACE + 2, %ax
    expect %ax, 0x1044
    peek l, SPACE + 0x100, %eax
    expect %eax, -1
    peek l, SPACE + 0x8000, %eax     /* device 2 */
    expect %eax, -1
    select 0x00000800                /* not enabled */
    mov $0xcfc, %dx
    in %dx, %eax
    expect %eax, -1
    select 0x80000800
    mov $0xcfc, %dx
    mov $buffer, %edi
    mov $2, %ecx
    cld
    rep insl
    mov buffer+4(%rip), %eax
    expect %eax, 0x10441af4
"""
    async with guest(tiny_guest, body + END + "buffer: .quad 0") as vm:
        await vm.wait()
        assert vm.console.scrollback == b"y"
        (vcpu,) = vm.statistics().vcpus
        assert vcpu.mmio == 0
        assert (vcpu.registers, vcpu.unassigned) == (12, 4)


async def test_a_bar_is_sized_enabled_and_moved(tiny_guest: Assemble) -> None:
    body = f"""
    poke l, SPACE + 0x10, -1
    poke l, SPACE + 0x14, -1
    peek l, SPACE + 0x10, %eax
    expect %eax, {-pci.BAR_BYTES | 4}
    peek l, SPACE + 0x14, %eax
    expect %eax, -1
    poke l, SPACE + 0x10, BAR
    poke l, SPACE + 0x14, 0
    peek w, COMMON + {pci_common.NUM_QUEUES}, %ax
    expect %ax, -1
    poke w, COMMAND, 6
    peek w, COMMON + {pci_common.NUM_QUEUES}, %ax
    expect %ax, 1
    poke l, SPACE + 0x10, BAR + 0x8000000
    peek w, COMMON + {pci_common.NUM_QUEUES}, %ax
    expect %ax, -1
    peek w, COMMON + 0x8000000 + {pci_common.NUM_QUEUES}, %ax
    expect %ax, 1
    poke l, SPACE + 0x10, 0          /* over RAM: it answers nowhere */
    peek w, COMMON + 0x8000000 + {pci_common.NUM_QUEUES}, %ax
    expect %ax, -1
"""
    async with guest(tiny_guest, body + END) as vm:
        await vm.wait()
        assert vm.console.scrollback == b"y"


# Vector 0x41 prints 'i'. Told by the console, the guest masks ('m'), unmasks ('u'), prints the
# pending bit ('p') or ends ('q'), and acknowledges each by the capital.
MSI_GUEST = f"""
    mov $0x200000, %esp
    mov $idt + 0x41 * 16, %edi
    mov $handler, %eax
    mov %ax, (%rdi)
    mov %cs, 2(%rdi)
    movw $0x8e00, 4(%rdi)
    shr $16, %eax
    mov %ax, 6(%rdi)
    lidt idt_pointer(%rip)
    poke l, 0xfee000f0, 0x1ff        /* the local APIC is on */
    poke w, COMMAND, 6
    poke l, TABLE, 0xfee00000
    poke l, TABLE + 4, 0
    poke l, TABLE + 8, 0x41
    poke l, TABLE + 12, 0
    poke w, MSIX + 2, 0x8000
    poke w, COMMON + {pci_common.CONFIG_MSIX_VECTOR}, 0
    peek w, COMMON + {pci_common.CONFIG_MSIX_VECTOR}, %ax
    expect %ax, 0
    sti
    putc 'R'
listen:
    inb 0x3fd
    test $1, %al
    jz listen
    inb 0x3f8
    cmp $'m', %al
    je mask
    cmp $'u', %al
    je unmask
    cmp $'p', %al
    je pending
    cmp $'q', %al
    jne listen
    poweroff
mask:
    poke l, TABLE + 12, 1
    putc 'M'
    jmp listen
unmask:
    poke l, TABLE + 12, 0
    putc 'U'
    jmp listen
pending:
    peek l, PBA, %eax
    add $'0', %al
    mov $0x3f8, %dx
    out %al, %dx
    putc 'P'
    jmp listen
fail:
    putc 'n'
    poweroff
handler:
    push %rax
    push %rbx
    push %rdx
    putc 'i'
    poke l, 0xfee000b0, 0            /* EOI */
    pop %rdx
    pop %rbx
    pop %rax
    iretq
    .balign 8
idt_pointer: .word 4095
    .quad idt
    .balign 16
idt: .fill 4096
"""


class Told:
    """The guest of MSI_GUEST, and what it printed since."""

    def __init__(self, vm: avmm.MicroVM) -> None:
        self.vm = vm
        self.at = 0

    async def says(self, text: bytes) -> None:
        await self.vm.console.expect(text, timeout=20)

    async def unmask(self) -> None:
        """What was pending comes at once; the handler may run before or after the answer."""
        await self.vm.console.write(b"u")
        await self.says(b"iU|Ui")

    async def tell(self, key: bytes) -> None:
        await self.vm.console.write(key)
        await self.says(key.upper())


async def test_a_vector_is_sent_masked_and_pending(tiny_guest: Assemble) -> None:
    async with guest(tiny_guest, MSI_GUEST) as vm:
        told, interrupt = Told(vm), device_of(vm).interrupts.config
        await told.says(b"R")
        interrupt.raise_config()
        await told.says(b"i")
        await told.tell(b"m")
        await told.tell(b"p")
        interrupt.raise_config()
        interrupt.raise_config()
        await told.tell(b"p")
        await told.unmask()
        await told.tell(b"p")
        await told.tell(b"m")
        await told.tell(b"p")
        await vm.console.write(b"q")
        assert (await vm.wait()).kind is avmm.ExitKind.POWEROFF
        printed = vm.console.scrollback.replace(b"U", b"").replace(b"P", b"")
        assert printed == b"RiM01i0M0"


async def test_a_function_that_is_masked_keeps_its_interrupts(tiny_guest: Assemble) -> None:
    body = MSI_GUEST.replace("TABLE + 12, 1", "(MSIX + 2), 0xc000").replace(
        "unmask:\n    poke l, TABLE + 12, 0", "unmask:\n    poke l, MSIX, 0x80000011"
    )
    async with guest(tiny_guest, body) as vm:
        told, interrupt = Told(vm), device_of(vm).interrupts.config
        await told.says(b"R")
        await told.tell(b"m")
        interrupt.raise_config()
        await told.tell(b"p")
        await told.unmask()
        await vm.console.write(b"q")
        await vm.wait()
        assert b"1P" in vm.console.scrollback


QUEUE_GPA = 0x300000

NOTIFY_GUEST = f"""
    poke w, COMMAND, 6
    poke b, COMMON + {pci_common.DEVICE_STATUS}, 3
    poke l, COMMON + {pci_common.DRIVER_FEATURE_SELECT}, 1
    poke l, COMMON + {pci_common.DRIVER_FEATURE}, 1
    poke b, COMMON + {pci_common.DEVICE_STATUS}, 11
    poke w, COMMON + {pci_common.QUEUE_SIZE}, 8
    poke l, COMMON + {pci_common.QUEUE_DESC}, {QUEUE_GPA:#x}
    poke l, COMMON + {pci_common.QUEUE_DRIVER}, {QUEUE_GPA + 0x1000:#x}
    poke l, COMMON + {pci_common.QUEUE_DEVICE}, {QUEUE_GPA + 0x2000:#x}
    poke w, COMMON + {pci_common.QUEUE_ENABLE}, 1
    poke b, COMMON + {pci_common.DEVICE_STATUS}, 15
    poke l, {QUEUE_GPA:#x}, {QUEUE_GPA + 0x3000:#x}
    poke l, {QUEUE_GPA + 4:#x}, 0
    poke l, {QUEUE_GPA + 8:#x}, 16
    poke l, {QUEUE_GPA + 12:#x}, 2   /* a buffer to be written */
    poke w, {QUEUE_GPA + 0x1002:#x}, 1
    NOTIFY_HERE
1:  peek w, {QUEUE_GPA + 0x2002:#x}, %ax
    cmp $1, %ax
    jne 1b
    peek l, {QUEUE_GPA + 0x2008:#x}, %eax
    expect %eax, 16
"""


@pytest.mark.parametrize("size", ["b", "w", "l"])
async def test_a_notification_reaches_its_queue_without_an_exit(
    tiny_guest: Assemble, size: str
) -> None:
    body = NOTIFY_GUEST.replace("NOTIFY_HERE", f"poke {size}, NOTIFY, 0")
    async with guest(tiny_guest, body + END) as vm:
        await vm.wait()
        assert vm.console.scrollback == b"y"
        (vcpu,) = vm.statistics().vcpus
        assert vcpu.mmio == 6, "command, selector, status, enable"
        assert vm.statistics().devices["rng0"].ignored == 0


@pytest.mark.parametrize(("size", "exits"), [("w", 6), ("l", 7)])
async def test_a_kvm_that_wants_one_width_gets_a_drivers_own(
    tiny_guest: Assemble, monkeypatch: pytest.MonkeyPatch, size: str, exits: int
) -> None:
    extension = Kvm.extension
    monkeypatch.setattr(
        Kvm, "extension", lambda kvm, name: "any_length" not in name and extension(kvm, name)
    )
    body = NOTIFY_GUEST.replace("NOTIFY_HERE", f"poke {size}, NOTIFY, 0")
    async with guest(tiny_guest, body + END) as vm:
        await vm.wait()
        assert vm.console.scrollback == b"y"
        (vcpu,) = vm.statistics().vcpus
        assert vcpu.mmio == exits
        assert vm.statistics().devices["rng0"].ignored == 0


async def test_notifications_follow_the_bar(tiny_guest: Assemble) -> None:
    move = "poke l, SPACE + 0x10, BAR + 0x40000\npoke w, NOTIFY + 0x40000, 0"
    async with guest(tiny_guest, NOTIFY_GUEST.replace("NOTIFY_HERE", move) + END) as vm:
        await vm.wait()
        assert vm.console.scrollback == b"y"
        (vcpu,) = vm.statistics().vcpus
        assert vcpu.mmio == 7


async def test_thirty_one_devices_are_there(tiny_guest: Assemble, tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(4096))
    body = f"""
    mov ${SPACE:#x}, %ebx
    mov $31, %ecx
1:  movl (%rbx), %eax
    expect %eax, 0x10421af4
    add $0x8000, %ebx
    dec %ecx
    jnz 1b
    mov ${layout.PCI_ECAM:#x}, %ebx
    movl (%rbx), %eax
    expect %eax, 0x00081b36
"""
    kernel = tiny_guest(MACROS + body + END)
    disks = [avmm.Disk(str(disk), read_only=True) for _ in range(31)]
    before = len(os.listdir("/proc/self/fd"))
    config = avmm.Config(kernel=str(kernel), memory="4M", cmdline="", disks=disks)
    async with avmm.MicroVM(config) as vm:
        await vm.wait()
        assert vm.console.scrollback == b"y"
    assert len(os.listdir("/proc/self/fd")) <= before + 8  # asyncio's own pool
