"""A driver of the first PCI device for tiny guests, as text for the assembler."""

from __future__ import annotations

from avmm.mem import layout
from avmm.pci import function as header
from avmm.virtio.transport import pci, pci_common

SPACE = layout.PCI_ECAM + (1 << 15)
BAR = layout.PCI_MEMORY
COMMON, NOTIFY = BAR + pci.COMMON, BAR + pci.NOTIFY
DESC, AVAIL, USED = 0x300000, 0x301000, 0x302000

# A driver of a split queue of 16: `call n` offers the chain whose first descriptor is number n and
# waits for it; %ecx counts.
DRIVER = f"""
.macro poke size, at, value
    mov $\\at, %ebx
    mov\\size $\\value, (%rbx)
.endm
.macro descriptor index, at, bytes, flags, next
    movl $\\at, {DESC:#x} + 16 * \\index
    movl $0, {DESC + 4:#x} + 16 * \\index
    movl $\\bytes, {DESC + 8:#x} + 16 * \\index
    movw $\\flags, {DESC + 12:#x} + 16 * \\index
    movw $\\next, {DESC + 14:#x} + 16 * \\index
.endm
.macro offer head
    movl %ecx, %eax
    and $15, %eax
    movw $\\head, {AVAIL + 4:#x}(,%eax,2)
    inc %ecx
    movw %cx, {AVAIL + 2:#x}
.endm
.macro await_all
    poke w, {NOTIFY:#x}, 0
1:  cmpw %cx, {USED + 2:#x}
    jne 1b
.endm
.macro print_answer at
    mov $\\at, %esi
    mov $0x3f8, %dx
2:  lodsb
    test %al, %al
    jz 3f
    out %al, %dx
    jmp 2b
3:
.endm
    xor %ecx, %ecx
    poke w, {SPACE + header.COMMAND:#x}, 6
    poke b, {COMMON + pci_common.DEVICE_STATUS:#x}, 3
    poke l, {COMMON + pci_common.DRIVER_FEATURE_SELECT:#x}, 1
    poke l, {COMMON + pci_common.DRIVER_FEATURE:#x}, 1
    poke b, {COMMON + pci_common.DEVICE_STATUS:#x}, 11
    poke w, {COMMON + pci_common.QUEUE_SIZE:#x}, 16
    poke l, {COMMON + pci_common.QUEUE_DESC:#x}, {DESC:#x}
    poke l, {COMMON + pci_common.QUEUE_DRIVER:#x}, {AVAIL:#x}
    poke l, {COMMON + pci_common.QUEUE_DEVICE:#x}, {USED:#x}
    poke w, {COMMON + pci_common.QUEUE_ENABLE:#x}, 1
    poke b, {COMMON + pci_common.DEVICE_STATUS:#x}, 15
"""

# Copies sector 2 of its disk to sector 7 and prints it.
COPIER = (
    DRIVER
    + "descriptor 0, read, 16, 1, 1\ndescriptor 1, 0x320000, 512, 3, 2\n"
    + "descriptor 2, 0x330000, 1, 2, 0\n"
    + "descriptor 3, write, 16, 1, 4\ndescriptor 4, 0x320000, 512, 1, 5\n"
    + "descriptor 5, 0x330001, 1, 2, 0\n"
    + """
    movw $0xffff, 0x330000
    offer 0
    await_all
    offer 3
    await_all
    cmpw $0, 0x330000
    jne fail
    print_answer 0x320000
    poweroff
fail:
    putc 'n'
    poweroff
    .balign 8
read:  .long 0, 0
    .quad 2
write: .long 1, 0
    .quad 7
"""
)
