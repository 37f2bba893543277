/* The vCPU loop: KVM_RUN without the GIL, and the exits that are answered in C. */
#ifndef AV_VCPU_H
#define AV_VCPU_H

#include <stddef.h>
#include <stdint.h>

#include "budget.h"
#include "interrupt.h"
#include "regs.h"
#include "rtc.h"
#include "uart.h"

/* cdef begin */
/* What leaves av_vcpu_run(). Of the first four Python owes an answer; AV_EXIT_UART_FULL wants
 * the UART drained; the others end or park the vCPU. */
enum av_exit_kind {
    AV_EXIT_PIO_READ,
    AV_EXIT_PIO_WRITE,
    AV_EXIT_MMIO_READ,
    AV_EXIT_MMIO_WRITE,
    AV_EXIT_UART_FULL,
    AV_EXIT_KICKED,
    AV_EXIT_HLT,
    AV_EXIT_SHUTDOWN,       /* triple fault */
    AV_EXIT_SYSTEM_EVENT,   /* value: KVM_SYSTEM_EVENT_* */
    AV_EXIT_FAIL_ENTRY,     /* value: the processor's reason */
    AV_EXIT_INTERNAL_ERROR, /* value: KVM_INTERNAL_ERROR_* */
    AV_EXIT_UNKNOWN         /* value: kvm_run.exit_reason */
};

/* location: port or guest physical address. size: 1, 2, 4 or 8 bytes.
 * value: what was written, or, set by the caller before the next run, what a read returns. */
struct av_exit {
    uint32_t kind;
    uint32_t size;
    uint64_t location;
    uint64_t value;
};

/* Counts of exits since creation, and where they were answered. */
struct av_vcpu_stats {
    uint64_t pio_python;
    uint64_t mmio_python;
    uint64_t uart;
    uint64_t interrupt;  /* virtio-mmio InterruptStatus and InterruptACK */
    uint64_t registers;  /* PCI configuration, MSI-X tables, the clock */
    uint64_t unassigned;
    uint64_t signals;
    uint64_t other;
    uint64_t python_ns;  /* spent outside av_vcpu_run() between two runs */
    uint64_t delays;     /* sleeps because the VM had spent its budget, and how long they took */
    uint64_t delayed_ns;
};

/* Which addresses are answered where; one a VM, complete before the first vCPU runs. */
struct av_dispatch;
struct av_dispatch *av_dispatch_create(void); /* NULL: errno */
void av_dispatch_destroy(struct av_dispatch *dispatch);
/* Accesses to these are exits to Python; all others are unassigned: reads give ones. -ENOSPC. */
int av_dispatch_add_pio(struct av_dispatch *dispatch, uint64_t base, uint64_t size);
int av_dispatch_add_mmio(struct av_dispatch *dispatch, uint64_t base, uint64_t size);
/* All are borrowed and must outlive every vCPU. -ENOSPC; -EBUSY for a second UART or clock. */
int av_dispatch_add_uart(struct av_dispatch *dispatch, uint64_t port, struct av_uart *uart);
int av_dispatch_add_rtc(struct av_dispatch *dispatch, uint64_t port, struct av_rtc *rtc);
int av_dispatch_add_interrupt(struct av_dispatch *dispatch, uint64_t mmio_base,
                              struct av_interrupt *interrupt);
/* Accesses to it are answered as it says, and are exits to Python at its address otherwise. */
int av_dispatch_add_regs(struct av_dispatch *dispatch, struct av_regs *regs);
/* PCI configuration space: there, and through ports 0xCF8 and 0xCFC, whose accesses to registers
 * that are Python's are exits at the memory-mapped address. Functions are added as registers;
 * of the others all reads give ones. */
void av_dispatch_set_ecam(struct av_dispatch *dispatch, uint64_t gpa, uint64_t size_bytes);
/* What the vCPUs' exits may take: processor time that their threads spend between two runs is
 * charged to it, and while it is overdrawn they wait. Borrowed. */
void av_dispatch_set_budget(struct av_dispatch *dispatch, struct av_budget *budget);

struct av_vcpu;
/* vcpu_fd and dispatch are borrowed. NULL: *error is the errno. */
struct av_vcpu *av_vcpu_create(int vcpu_fd, size_t run_bytes, struct av_dispatch *dispatch,
                               int *error);
void av_vcpu_destroy(struct av_vcpu *vcpu);
/* Once, first, on the thread that will run vCPUs: blocks every signal but the kick's. 0 or -errno. */
int av_vcpu_enter_thread(void);
/* Run the guest until something is not answered in C. 0 and *exit filled, or -errno of KVM_RUN. */
int av_vcpu_run(struct av_vcpu *vcpu, struct av_exit *exit);
/* Any thread: the run under way, or the next one, returns AV_EXIT_KICKED. Never lost. */
void av_vcpu_kick(struct av_vcpu *vcpu);
void av_vcpu_statistics(const struct av_vcpu *vcpu, struct av_vcpu_stats *out);
/* ioctl with an unsigned long argument, which Python's own cannot pass whole. Result or -errno. */
int av_ioctl_value(int fd, unsigned long request, unsigned long value);
/* cdef end */

#endif
