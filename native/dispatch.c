#include "dispatch.h"

#include <errno.h>
#include <stdlib.h>

struct av_dispatch *av_dispatch_create(void)
{
    return calloc(1, sizeof(struct av_dispatch));
}

void av_dispatch_destroy(struct av_dispatch *dispatch)
{
    free(dispatch);
}

static int range_table_add(struct av_range_table *table, uint64_t base, uint64_t size)
{
    if (table->count == AV_DISPATCH_RANGES_MAX)
        return -ENOSPC;
    table->range[table->count++] = (struct av_range){ .base = base, .size = size };
    return 0;
}

bool av_range_table_has(const struct av_range_table *table, uint64_t at)
{
    for (uint32_t i = 0; i < table->count; i++)
        if (at - table->range[i].base < table->range[i].size)
            return true;
    return false;
}

int av_dispatch_add_pio(struct av_dispatch *dispatch, uint64_t base, uint64_t size)
{
    return range_table_add(&dispatch->pio, base, size);
}

int av_dispatch_add_mmio(struct av_dispatch *dispatch, uint64_t base, uint64_t size)
{
    return range_table_add(&dispatch->mmio, base, size);
}

int av_dispatch_add_uart(struct av_dispatch *dispatch, uint64_t port, struct av_uart *uart)
{
    if (dispatch->uart != NULL)
        return -EBUSY;
    dispatch->uart_port = port;
    dispatch->uart = uart;
    return 0;
}

int av_dispatch_add_rtc(struct av_dispatch *dispatch, uint64_t port, struct av_rtc *rtc)
{
    if (dispatch->rtc != NULL)
        return -EBUSY;
    dispatch->rtc_port = port;
    dispatch->rtc = rtc;
    return 0;
}

int av_dispatch_add_interrupt(struct av_dispatch *dispatch, uint64_t mmio_base,
                              struct av_interrupt *interrupt)
{
    if (dispatch->interrupts == AV_DISPATCH_INTERRUPTS_MAX)
        return -ENOSPC;
    dispatch->interrupt[dispatch->interrupts++] =
        (struct av_interrupt_slot){ .mmio_base = mmio_base, .interrupt = interrupt };
    return 0;
}

int av_dispatch_add_regs(struct av_dispatch *dispatch, struct av_regs *regs)
{
    if (dispatch->regs_count == AV_DISPATCH_REGS_MAX)
        return -ENOSPC;
    dispatch->regs[dispatch->regs_count++] = regs;
    return 0;
}

void av_dispatch_set_ecam(struct av_dispatch *dispatch, uint64_t gpa, uint64_t size_bytes)
{
    dispatch->ecam = gpa;
    dispatch->ecam_bytes = size_bytes;
}

void av_dispatch_set_budget(struct av_dispatch *dispatch, struct av_budget *budget)
{
    dispatch->budget = budget;
}
