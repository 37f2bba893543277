/* The packed format (virtio 1.3 section 2.8). */
#include <errno.h>
#include <stdatomic.h>

#include "vdriver_internal.h"

#define DESC_AVAIL (1u << 7)
#define DESC_USED (1u << 15)
#define EVENT_ENABLE 0u
#define EVENT_DISABLE 1u
#define EVENT_DESC 2u
#define WRAP (1u << 15)

static struct packed_desc *ring(const struct av_vdriver *d)
{
    return (struct packed_desc *)d->desc;
}

/* Flags that make a descriptor available in this round (2.8.1). */
static uint16_t mark(bool wrap)
{
    return wrap ? DESC_AVAIL : DESC_USED;
}

static uint16_t take_id(struct av_vdriver *d)
{
    uint16_t id = d->first_free;

    d->first_free = d->next_free[id];
    return id;
}

/* Put a descriptor into the next place. The first of a batch keeps its old flags: those of the
 * others mean nothing to the device before it has seen that one. */
static void put(struct av_vdriver *d, const struct packed_desc *desc)
{
    struct packed_desc *to = &ring(d)[d->next_avail];
    uint16_t flags = desc->flags | mark(d->avail_wrap);

    to->gpa = desc->gpa;
    to->len = desc->len;
    to->id = desc->id;
    if (d->unpublished++ == 0) {
        d->head_flags = flags;
        d->head_at = d->next_avail;
    } else {
        __atomic_store_n(&to->flags, flags, __ATOMIC_RELAXED);
    }
    if (++d->next_avail == d->size) {
        d->next_avail = 0;
        d->avail_wrap = !d->avail_wrap;
    }
    d->free--;
}

int av_packed_add(struct av_vdriver *d, const struct av_vdriver_segment *segments,
                  uint32_t readable, uint32_t writable, uint32_t token)
{
    uint32_t count = readable + writable;
    uint16_t id = take_id(d);

    if (d->tables != NULL && count > 1) {
        uint64_t offset = (uint64_t)id * AV_VDRIVER_SEGMENTS_MAX * sizeof(struct packed_desc);
        struct packed_desc *table = (struct packed_desc *)(d->tables + offset);

        /* Of a table's flags only WRITE counts: its length says where it ends (2.8.7). */
        for (uint32_t i = 0; i < count; i++)
            table[i] = (struct packed_desc){ .gpa = segments[i].gpa,
                                             .len = segments[i].size_bytes,
                                             .flags = i >= readable ? DESC_WRITE : 0 };
        put(d, &(struct packed_desc){ .gpa = d->table_gpa + offset,
                                      .len = count * (uint32_t)sizeof(*table),
                                      .id = id,
                                      .flags = DESC_INDIRECT });
        count = 1;
    } else {
        for (uint32_t i = 0; i < count; i++)
            put(d, &(struct packed_desc){ .gpa = segments[i].gpa,
                                          .len = segments[i].size_bytes,
                                          .id = id,
                                          .flags = (uint16_t)((i >= readable ? DESC_WRITE : 0) |
                                                              (i + 1 < count ? DESC_NEXT : 0)) });
    }
    d->note[id] = (struct chain_note){ .token = token, .count = (uint16_t)count };
    return 1;
}

/* Whether the device asked for a kick by one of the descriptors of this batch (2.8.10, 2.8.14). */
static bool wants_kick(const struct av_vdriver *d, uint16_t batch)
{
    const struct packed_event *event = (const struct packed_event *)d->device_area;
    uint16_t off_wrap, flags = __atomic_load_n(&event->flags, __ATOMIC_ACQUIRE) & 3;
    uint16_t offset;

    if (flags != EVENT_DESC || !d->event_idx)
        return flags != EVENT_DISABLE;
    off_wrap = __atomic_load_n(&event->off_wrap, __ATOMIC_RELAXED);
    offset = off_wrap & (WRAP - 1);
    /* On one number line: places of the round before this one are negative. */
    if ((off_wrap & WRAP) != (d->avail_wrap ? WRAP : 0))
        offset = (uint16_t)(offset - d->size);
    return (uint16_t)(d->next_avail - offset - 1) < batch;
}

bool av_packed_publish(struct av_vdriver *d)
{
    uint16_t batch = d->unpublished;

    d->unpublished = 0;
    /* Release: pairs with the device's acquire of these flags. It makes the whole batch visible
     * with its first descriptor. */
    __atomic_store_n(&ring(d)[d->head_at].flags, d->head_flags, __ATOMIC_RELEASE);
    /* Full: as in the split ring, the descriptors against the device's wish for kicks. */
    atomic_thread_fence(memory_order_seq_cst);
    return wants_kick(d, batch);
}

bool av_packed_more(const struct av_vdriver *d)
{
    /* Acquire: pairs with the device's release of the flags, for the rest of the descriptor. */
    uint16_t flags = __atomic_load_n(&ring(d)[d->next_used].flags, __ATOMIC_ACQUIRE);
    uint16_t both = d->used_wrap ? DESC_AVAIL | DESC_USED : 0;

    return (flags & (DESC_AVAIL | DESC_USED)) == both;
}

int av_packed_take(struct av_vdriver *d, uint32_t *token, uint32_t *written_bytes)
{
    const struct packed_desc *desc = &ring(d)[d->next_used];
    struct chain_note *note;
    uint16_t id;

    if (d->free == d->size || !av_packed_more(d))
        return 0;
    id = desc->id;
    if (id >= d->size || d->note[id].count == 0)
        return -EPROTO;
    note = &d->note[id];
    *token = note->token;
    *written_bytes = desc->len;
    d->next_free[id] = d->first_free;
    d->first_free = id;
    d->free = (uint16_t)(d->free + note->count);
    d->next_used = (uint16_t)(d->next_used + note->count);
    note->count = 0;
    if (d->next_used >= d->size) {
        d->next_used = (uint16_t)(d->next_used - d->size);
        d->used_wrap = !d->used_wrap;
    }
    return 1;
}

void av_packed_interrupts(struct av_vdriver *d, bool on)
{
    struct packed_event *event = (struct packed_event *)d->driver_area;
    uint16_t off_wrap = (uint16_t)(d->next_used | (d->used_wrap ? WRAP : 0));
    uint16_t flags = !on ? EVENT_DISABLE : d->event_idx ? EVENT_DESC : EVENT_ENABLE;

    if (on && d->event_idx)
        __atomic_store_n(&event->off_wrap, off_wrap, __ATOMIC_RELAXED);
    /* Release: the device must not see the wish for a place before the place. */
    __atomic_store_n(&event->flags, flags, __ATOMIC_RELEASE);
}
