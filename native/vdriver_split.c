/* The split format (virtio 1.3 section 2.7). */
#include <errno.h>
#include <stdatomic.h>

#include "vdriver_internal.h"

#define AVAIL_NO_INTERRUPT 1u
#define USED_NO_NOTIFY 1u

struct avail {
    uint16_t flags;
    uint16_t idx;
    uint16_t ring[]; /* then used_event */
};

struct used_elem {
    uint32_t id;
    uint32_t len;
};

struct used {
    uint16_t flags;
    uint16_t idx;
    struct used_elem ring[]; /* then avail_event */
};

static struct avail *avail(const struct av_vdriver *d)
{
    return (struct avail *)d->driver_area;
}

static struct used *used(const struct av_vdriver *d)
{
    return (struct used *)d->device_area;
}

static uint16_t take_free(struct av_vdriver *d)
{
    uint16_t index = d->first_free;

    d->first_free = d->next_free[index];
    d->free--;
    return index;
}

/* Fill an indirect table; its descriptors follow one another. */
static void fill_table(struct split_desc *table, const struct av_vdriver_segment *segments,
                       uint32_t readable, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        table[i] = (struct split_desc){
            .gpa = segments[i].gpa,
            .len = segments[i].size_bytes,
            .flags = (uint16_t)((i >= readable ? DESC_WRITE : 0) | (i + 1 < count ? DESC_NEXT : 0)),
            .next = (uint16_t)(i + 1 < count ? i + 1 : 0),
        };
}

int av_split_add(struct av_vdriver *d, const struct av_vdriver_segment *segments,
                 uint32_t readable, uint32_t writable, uint32_t token)
{
    struct split_desc *desc = (struct split_desc *)d->desc;
    uint32_t count = readable + writable;
    uint16_t head = d->first_free, at = head;

    if (d->tables != NULL && count > 1) {
        uint64_t offset = (uint64_t)head * AV_VDRIVER_SEGMENTS_MAX * sizeof(*desc);

        take_free(d);
        fill_table((struct split_desc *)(d->tables + offset), segments, readable, count);
        desc[head] = (struct split_desc){ .gpa = d->table_gpa + offset,
                                          .len = count * (uint32_t)sizeof(*desc),
                                          .flags = DESC_INDIRECT };
        count = 1;
    } else {
        for (uint32_t i = 0; i < count; i++) {
            at = take_free(d);
            desc[at] = (struct split_desc){
                .gpa = segments[i].gpa,
                .len = segments[i].size_bytes,
                .flags = (uint16_t)((i >= readable ? DESC_WRITE : 0) |
                                    (i + 1 < count ? DESC_NEXT : 0)),
                .next = i + 1 < count ? d->first_free : 0,
            };
        }
    }
    d->note[head] = (struct chain_note){ .token = token, .count = (uint16_t)count, .last = at };
    avail(d)->ring[d->next_avail++ & (d->size - 1)] = head;
    d->unpublished++;
    return 1;
}

bool av_split_publish(struct av_vdriver *d)
{
    uint16_t event, old = d->published;

    /* Release: pairs with the device's acquire of idx, so that it sees the chains it announces. */
    __atomic_store_n(&avail(d)->idx, d->next_avail, __ATOMIC_RELEASE);
    d->published = d->next_avail;
    d->unpublished = 0;
    /* Full: idx against the device's wish for kicks. It pairs with the device's barrier between
     * that wish and its last look at idx; without it, it could sleep beside our chains. */
    atomic_thread_fence(memory_order_seq_cst);
    if (!d->event_idx)
        return !(__atomic_load_n(&used(d)->flags, __ATOMIC_RELAXED) & USED_NO_NOTIFY);
    event = __atomic_load_n((uint16_t *)&used(d)->ring[d->size], __ATOMIC_RELAXED);
    return (uint16_t)(d->next_avail - event - 1) < (uint16_t)(d->next_avail - old);
}

bool av_split_more(const struct av_vdriver *d)
{
    /* Acquire: pairs with the device's release of idx, for the elements and data below it. */
    return __atomic_load_n(&used(d)->idx, __ATOMIC_ACQUIRE) != d->next_used;
}

int av_split_take(struct av_vdriver *d, uint32_t *token, uint32_t *written_bytes)
{
    const struct used_elem *elem;
    struct chain_note *note;
    uint32_t id;

    if (!av_split_more(d))
        return 0;
    elem = &used(d)->ring[d->next_used & (d->size - 1)];
    id = __atomic_load_n(&elem->id, __ATOMIC_RELAXED); /* once: it is the device's to change */
    if (id >= d->size || d->note[id].count == 0)
        return -EPROTO;
    note = &d->note[id];
    *token = note->token;
    *written_bytes = elem->len;
    /* The chain's descriptors are still linked with one another in the free list's array. */
    d->next_free[note->last] = d->first_free;
    d->first_free = (uint16_t)id;
    d->free = (uint16_t)(d->free + note->count);
    note->count = 0;
    d->next_used++;
    return 1;
}

void av_split_interrupts(struct av_vdriver *d, bool on)
{
    if (!d->event_idx)
        __atomic_store_n(&avail(d)->flags, on ? 0 : AVAIL_NO_INTERRUPT, __ATOMIC_RELAXED);
    else if (on)
        __atomic_store_n(&avail(d)->ring[d->size], d->next_used, __ATOMIC_RELAXED);
    /* Off with EVENT_IDX: used_event stays where the last interrupt passed it. */
}
