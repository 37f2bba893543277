/* Where vCPUs begin: the first in 64-bit mode, the others in real mode, by a start-up interrupt. */
#define STACK_BYTES 0x4000
#define GDT 0x500         /* avmm's own: code is 0x10, data 0x18 (mem/layout.py, boot/entry.py) */
#define GDT_LIMIT 39
#define PAGE_TABLES 0x9000
#define CR0_PE_ET_PG 0x80000011
#define CR4_PAE 0x20
#define MSR_EFER 0xc0000080
#define EFER_LME 0x100

    .code64
    .section .text.start, "ax"
    .global _start
_start:
    mov $stacks + STACK_BYTES, %rsp
    mov %rsi, %rdi
    call attacker_main
1:  hlt
    jmp 1b

/* Copied below 1 MiB. */
    .code16
    .global trampoline
trampoline:
    cli
    lgdtl %cs:gdt_pointer - trampoline
    mov $CR4_PAE, %eax
    mov %eax, %cr4
    mov $PAGE_TABLES, %eax
    mov %eax, %cr3
    mov $MSR_EFER, %ecx
    mov $EFER_LME, %eax
    xor %edx, %edx
    wrmsr
    mov $CR0_PE_ET_PG, %eax
    mov %eax, %cr0
    ljmpl $0x10, $other_start
    .balign 4
gdt_pointer:
    .word GDT_LIMIT
    .long GDT
    .global trampoline_end
trampoline_end:

    .code64
other_start:
    mov $0x18, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $1, %eax
    lock xadd %eax, started(%rip)
    inc %eax
    mov %eax, %edi
    inc %eax
    imul $STACK_BYTES, %eax, %eax
    add $stacks, %eax
    mov %eax, %esp
    call other_main
1:  hlt
    jmp 1b

    .bss
    .balign 16
started: .long 0
    .balign 4096
stacks: .fill STACK_BYTES * 4
