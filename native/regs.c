#include "regs.h"

#include <stdatomic.h>
#include <stdlib.h>

struct reg_byte {
    _Atomic uint8_t value;
    _Atomic uint8_t writable;
    _Atomic uint8_t watched;
    _Atomic bool reads_handed_over;
    _Atomic bool writes_handed_over;
};

struct av_regs {
    _Atomic uint64_t gpa;
    uint32_t size;
    struct reg_byte byte[];
};

struct av_regs *av_regs_create(uint32_t size_bytes)
{
    struct av_regs *regs = calloc(1, sizeof(*regs) + size_bytes * sizeof(regs->byte[0]));
    if (regs == NULL)
        return NULL;
    regs->size = size_bytes;
    atomic_init(&regs->gpa, UINT64_MAX);
    return regs;
}

void av_regs_destroy(struct av_regs *regs)
{
    free(regs);
}

/* How many of `size` bytes at `offset` exist. */
static uint32_t within(const struct av_regs *regs, uint32_t offset, uint32_t size)
{
    if (offset >= regs->size)
        return 0;
    return size < regs->size - offset ? size : regs->size - offset;
}

void av_regs_define(struct av_regs *regs, uint32_t offset, uint32_t size, uint64_t value,
                    uint64_t writable)
{
    for (uint32_t i = 0; i < within(regs, offset, size); i++) {
        atomic_store(&regs->byte[offset + i].value, (uint8_t)(value >> 8 * i));
        atomic_store(&regs->byte[offset + i].writable, (uint8_t)(writable >> 8 * i));
    }
}

void av_regs_watch(struct av_regs *regs, uint32_t offset, uint32_t size, uint64_t bits)
{
    for (uint32_t i = 0; i < within(regs, offset, size); i++)
        atomic_store(&regs->byte[offset + i].watched, (uint8_t)(bits >> 8 * i));
}

uint64_t av_regs_get(const struct av_regs *regs, uint32_t offset, uint32_t size)
{
    uint64_t value = size < 8 ? ((uint64_t)1 << 8 * size) - 1 : UINT64_MAX;

    for (uint32_t i = 0; i < within(regs, offset, size); i++) {
        value &= ~((uint64_t)0xff << 8 * i);
        value |= (uint64_t)atomic_load(&regs->byte[offset + i].value) << 8 * i;
    }
    return value;
}

static uint8_t merged(const struct reg_byte *byte, uint8_t value)
{
    uint8_t writable = atomic_load(&byte->writable);

    return (uint8_t)((atomic_load(&byte->value) & ~writable) | (value & writable));
}

void av_regs_put(struct av_regs *regs, uint32_t offset, uint32_t size, uint64_t value)
{
    for (uint32_t i = 0; i < within(regs, offset, size); i++) {
        struct reg_byte *byte = &regs->byte[offset + i];
        atomic_store(&byte->value, merged(byte, (uint8_t)(value >> 8 * i)));
    }
}

void av_regs_hand_over(struct av_regs *regs, uint32_t offset, uint32_t size, bool reads)
{
    for (uint32_t i = 0; i < within(regs, offset, size); i++) {
        atomic_store(&regs->byte[offset + i].writes_handed_over, true);
        atomic_store(&regs->byte[offset + i].reads_handed_over, reads);
    }
}

void av_regs_move(struct av_regs *regs, uint64_t gpa)
{
    atomic_store(&regs->gpa, gpa);
}

bool av_regs_at(const struct av_regs *regs, uint64_t gpa, uint32_t *offset)
{
    uint64_t base = atomic_load(&regs->gpa);

    if (base == UINT64_MAX || gpa - base >= regs->size)
        return false;
    *offset = (uint32_t)(gpa - base);
    return true;
}

bool av_regs_read(const struct av_regs *regs, uint32_t offset, uint32_t size, uint8_t *data)
{
    uint64_t value = av_regs_get(regs, offset, size);

    for (uint32_t i = 0; i < within(regs, offset, size); i++)
        if (atomic_load(&regs->byte[offset + i].reads_handed_over))
            return false;
    for (uint32_t i = 0; i < size; i++)
        data[i] = (uint8_t)(value >> 8 * i);
    return true;
}

bool av_regs_write(struct av_regs *regs, uint32_t offset, uint32_t size, const uint8_t *data)
{
    uint32_t count = within(regs, offset, size);

    for (uint32_t i = 0; i < count; i++) {
        const struct reg_byte *byte = &regs->byte[offset + i];
        uint8_t changed = (uint8_t)(merged(byte, data[i]) ^ atomic_load(&byte->value));
        if (atomic_load(&byte->writes_handed_over) || (changed & atomic_load(&byte->watched)) != 0)
            return false;
    }
    for (uint32_t i = 0; i < count; i++) {
        struct reg_byte *byte = &regs->byte[offset + i];
        atomic_store(&byte->value, merged(byte, data[i]));
    }
    return true;
}
