/* Inside of struct av_dispatch, for vcpu.c. */
#ifndef AV_DISPATCH_H
#define AV_DISPATCH_H

#include <stdbool.h>
#include <stdint.h>

#include "vcpu.h"

#define AV_DISPATCH_RANGES_MAX 64
#define AV_DISPATCH_INTERRUPTS_MAX 32
#define AV_DISPATCH_REGS_MAX 128

struct av_range {
    uint64_t base;
    uint64_t size;
};

struct av_range_table {
    uint32_t count;
    struct av_range range[AV_DISPATCH_RANGES_MAX];
};

struct av_interrupt_slot {
    uint64_t mmio_base;
    struct av_interrupt *interrupt;
};

struct av_dispatch {
    struct av_range_table pio;
    struct av_range_table mmio;
    uint64_t uart_port;
    struct av_uart *uart;
    uint64_t rtc_port;
    struct av_rtc *rtc;
    uint32_t interrupts;
    struct av_interrupt_slot interrupt[AV_DISPATCH_INTERRUPTS_MAX];
    uint32_t regs_count;
    struct av_regs *regs[AV_DISPATCH_REGS_MAX];
    uint64_t ecam; /* guest physical address; 0: there is no PCI */
    uint64_t ecam_bytes;
    _Atomic uint32_t pci_address; /* what the guest wrote to port 0xCF8 */
    struct av_budget *budget; /* NULL: none */
};

bool av_range_table_has(const struct av_range_table *table, uint64_t at);

#endif
