/* The packed layout: one descriptor ring for both directions (virtio 1.3 section 2.8). */
#include <string.h>

#include "vring_chain.h"

#define DESC_AVAIL (1u << 7)
#define DESC_USED (1u << 15)

/* An event suppression structure (2.8.14) as one word: 15 bits of offset and one of wrap counter,
 * which mean something for EVENT_DESC only, then 16 of flags. */
#define EVENT_ENABLE (0u << 16)
#define EVENT_DISABLE (1u << 16)
#define EVENT_DESC (2u << 16)
#define EVENT_FLAGS (3u << 16)
#define EVENT_UNKNOWN UINT32_MAX /* never written: what is there is not ours */
#define WRAP (1u << 15)

/* Where an empty ring begins (2.8.1): at its first descriptor, both wrap counters 1. */
#define BASE_EMPTY (WRAP << 16 | WRAP)

int av_vring_packed_start(struct av_vring *ring, const struct av_vring_setup *setup)
{
    struct av_packed *packed = &ring->packed;
    uint32_t size = setup->size, base = setup->resume ? setup->base : BASE_EMPTY;
    void *desc, *driver_event, *device_event;

    if (setup->desc_gpa % 16 != 0 || setup->driver_gpa % 4 != 0 || setup->device_gpa % 4 != 0)
        return -EINVAL;
    /* Some front-ends know only the available half. Nothing is in flight where a ring was left, so
     * that the used half is the same; and where it is 0 in truth, so is the other. */
    if (base >> 16 == 0)
        base |= base << 16;
    if ((base & ~WRAP & 0xFFFF) >= size || (base >> 16 & ~WRAP) >= size)
        return -EINVAL;
    desc = av_gmem_hva(ring->mem, setup->desc_gpa, sizeof(struct av_desc) * size);
    driver_event = av_gmem_hva(ring->mem, setup->driver_gpa, sizeof(uint32_t));
    device_event = av_gmem_hva(ring->mem, setup->device_gpa, sizeof(uint32_t));
    if (desc == NULL || driver_event == NULL || device_event == NULL)
        return -EFAULT;
    *packed = (struct av_packed){ .desc = desc,
                                  .driver_event = driver_event,
                                  .device_event = device_event,
                                  .kicks = EVENT_UNKNOWN,
                                  .avail_wrap = (base & WRAP) != 0,
                                  .used_wrap = (base >> 16 & WRAP) != 0 };
    ring->next_avail = base & ~WRAP & 0xFFFF;
    ring->next_used = base >> 16 & ~WRAP;
    memset(ring->taken, 0, sizeof(ring->taken));
    return 0;
}

uint32_t av_vring_packed_base(const struct av_vring *ring)
{
    uint32_t avail = ring->next_avail | (ring->packed.avail_wrap ? WRAP : 0);
    uint32_t used = ring->next_used | (ring->packed.used_wrap ? WRAP : 0);

    return avail | used << 16;
}

static uint16_t flags_of(uint64_t rest)
{
    return (uint16_t)(rest >> 48);
}

static uint16_t id_of(uint64_t rest)
{
    return (uint16_t)(rest >> 32);
}

/* Section 2.8.1: available when AVAIL is the driver's wrap counter and USED is not. */
static bool is_available(uint64_t rest, bool wrap)
{
    uint16_t flags = flags_of(rest);

    return ((flags & DESC_AVAIL) != 0) == wrap && ((flags & DESC_USED) != 0) != wrap;
}

/* All entries of an indirect table, one after the other (2.8.7): of their flags only WRITE means
 * anything, and their ids nothing; 0 or a fault. */
static int add_table(struct av_vring *ring, struct av_walk *walk, const struct av_desc *indirect)
{
    const void *table;
    uint32_t entries;
    int fault;

    if (!ring->indirect || (flags_of(indirect->rest) & AV_DESC_NEXT))
        return AV_FAULT_INDIRECT_NESTED;
    fault = av_walk_table(ring, indirect, &table, &entries);
    for (uint32_t i = 0; fault == AV_FAULT_NONE && i < entries; i++) {
        struct av_desc desc = av_desc_copy(table, i);
        fault = av_walk_add(ring, walk, &desc, (flags_of(desc.rest) & AV_DESC_WRITE) != 0);
    }
    return fault;
}

/* Follow the chain that begins with `desc`, at next_avail. How many descriptors it takes of the
 * ring, with the id in `desc`, that of the last (2.8.6); or a fault, negative. */
static int follow(struct av_vring *ring, struct av_desc *desc, struct av_walk *walk)
{
    int left = ring->size - ring->packed.in_flight, count = 0, fault;
    uint32_t at = ring->next_avail;
    bool wrap = ring->packed.avail_wrap;

    for (;;) {
        uint16_t flags = flags_of(desc->rest);

        if (count++ == left)
            return -AV_FAULT_CHAIN_LOOP;
        /* Section 2.8.17: the driver makes the rest of a chain available before its first. */
        if (!is_available(desc->rest, wrap))
            return -AV_FAULT_CHAIN_CUT;
        if (flags & AV_DESC_INDIRECT) {
            fault = count == 1 ? add_table(ring, walk, desc) : AV_FAULT_INDIRECT_NESTED;
            return fault == AV_FAULT_NONE ? 1 : -fault;
        }
        fault = av_walk_add(ring, walk, desc, (flags & AV_DESC_WRITE) != 0);
        if (fault != AV_FAULT_NONE)
            return -fault;
        if (!(flags & AV_DESC_NEXT))
            return count;
        if (++at == ring->size) {
            at = 0;
            wrap = !wrap;
        }
        *desc = av_desc_copy(ring->packed.desc, at);
    }
}

/* Forwards by `count` descriptors, at most the ring's size. */
static void advance(const struct av_vring *ring, uint16_t *at, bool *wrap, uint32_t count)
{
    uint32_t next = *at + count;

    if (next >= ring->size) {
        next -= ring->size;
        *wrap = !*wrap;
    }
    av_store16(at, (uint16_t)next);
}

int av_vring_packed_pop(struct av_vring *ring, struct av_chain *out, struct iovec *iov,
                        uint32_t iov_max)
{
    struct av_packed *packed = &ring->packed;
    const struct av_desc *first = &packed->desc[ring->next_avail];
    struct av_walk walk = { .out = out, .iov_max = iov_max };
    struct av_desc desc;
    int count;

    /* Acquire: pairs with the driver's write barrier before it sets the flags of a chain's first
     * descriptor. Without it we could read parts of the chain older than those flags. Length and
     * id come in the same read, so they are as new as the flags. */
    desc.rest = __atomic_load_n(&first->rest, __ATOMIC_ACQUIRE);
    if (!is_available(desc.rest, packed->avail_wrap))
        return 0;
    desc.gpa = __atomic_load_n(&first->gpa, __ATOMIC_RELAXED);
    *out = (struct av_chain){ .iov = iov };
    count = follow(ring, &desc, &walk);
    if (count < 0)
        return av_vring_break(ring, -count);
    out->head = id_of(desc.rest);
    if (out->head >= ring->size || ring->taken[out->head].descs != 0)
        return av_vring_break(ring, AV_FAULT_BAD_ID);
    ring->taken[out->head] = (struct av_taken){ .descs = (uint16_t)count,
                                                .writable_bytes = out->writable_bytes };
    packed->order[packed->popped++ % AV_VRING_SIZE_MAX] = out->head;
    packed->in_flight += (uint16_t)count;
    advance(ring, &ring->next_avail, &packed->avail_wrap, (uint32_t)count);
    return 1;
}

void av_vring_packed_unpop(struct av_vring *ring)
{
    struct av_packed *packed = &ring->packed;
    struct av_taken *taken = &ring->taken[packed->order[--packed->popped % AV_VRING_SIZE_MAX]];
    uint16_t count = taken->descs;
    uint32_t next;

    taken->descs = 0;
    packed->in_flight -= count;
    next = ring->next_avail;
    if (next < count) {
        next += ring->size;
        packed->avail_wrap = !packed->avail_wrap;
    }
    av_store16(&ring->next_avail, (uint16_t)(next - count));
}

void av_vring_packed_push(struct av_vring *ring, uint16_t head, uint32_t written_bytes)
{
    struct av_packed *packed = &ring->packed;
    struct av_taken *taken = &ring->taken[head];
    uint16_t count = taken->descs, flags = written_bytes != 0 ? AV_DESC_WRITE : 0;
    uint64_t rest;

    /* Section 2.8.8: one used descriptor, where the batch's first would be, may speak for a batch
     * by the id of its last; but for those before the last only that they were written wholly. */
    if (!ring->in_order || !ring->last_whole) {
        packed->last = ring->next_used;
        packed->last_wrap = packed->used_wrap;
    }
    if (packed->last_wrap)
        flags |= DESC_AVAIL | DESC_USED;
    rest = written_bytes | (uint64_t)head << 32 | (uint64_t)flags << 48;
    if (packed->batch == 0) {
        packed->first = packed->last;
        packed->first_wrap = packed->last_wrap;
    }
    /* The driver looks at them in order: it sees none before the first. */
    if (packed->last == packed->first)
        packed->first_rest = rest;
    else
        __atomic_store_n(&packed->desc[packed->last].rest, rest, __ATOMIC_RELAXED);
    ring->last_whole = written_bytes == taken->writable_bytes;
    packed->batch += count;
    packed->in_flight -= count;
    taken->descs = 0;
    advance(ring, &ring->next_used, &packed->used_wrap, count);
}

uint16_t av_vring_packed_publish(struct av_vring *ring)
{
    struct av_packed *packed = &ring->packed;
    uint16_t count = packed->batch;

    if (count != 0) {
        /* Release: pairs with the driver's read barrier after it reads a descriptor's flags.
         * Without it the driver could see them before the used descriptors, and data, that they
         * announce. Length and id go in the same write. */
        __atomic_store_n(&packed->desc[packed->first].rest, packed->first_rest, __ATOMIC_RELEASE);
        packed->batch = 0;
        if (ring->shown == 0) {
            packed->shown = packed->first;
            packed->shown_wrap = packed->first_wrap;
        }
    }
    return count;
}

/* The distance from one place in the ring to another: places are told apart by offset and wrap
 * counter, so that they repeat after two rounds. */
static uint32_t distance(const struct av_vring *ring, uint32_t from, bool from_wrap, uint32_t to,
                         bool to_wrap)
{
    uint32_t size = ring->size;

    return (to + (to_wrap == from_wrap ? 0 : size) + 2 * size - from) % (2 * size);
}

bool av_vring_packed_wants_interrupt(const struct av_vring *ring, uint16_t published)
{
    const struct av_packed *packed = &ring->packed;
    /* The driver writes the offset before the flags that say it means something; in one word, we
     * cannot have the new flags with an old offset. */
    uint32_t event = __atomic_load_n(packed->driver_event, __ATOMIC_RELAXED);

    if ((event & EVENT_FLAGS) == EVENT_DISABLE)
        return false;
    if (!ring->event_idx || (event & EVENT_FLAGS) != EVENT_DESC)
        return true;
    return distance(ring, packed->shown, packed->shown_wrap, event & (WRAP - 1),
                    (event & WRAP) != 0) < published;
}

void av_vring_packed_kicks(struct av_vring *ring, bool on)
{
    struct av_packed *packed = &ring->packed;
    uint32_t event = on ? EVENT_ENABLE : EVENT_DISABLE;

    if (on && ring->event_idx)
        event = EVENT_DESC | ring->next_avail | (packed->avail_wrap ? WRAP : 0);
    if (event == packed->kicks)
        return; /* spare the driver's cache */
    packed->kicks = event;
    __atomic_store_n(packed->device_event, event, __ATOMIC_RELAXED);
}

bool av_vring_packed_pending(const struct av_vring *ring)
{
    const struct av_desc *first = &ring->packed.desc[ring->next_avail];

    return is_available(__atomic_load_n(&first->rest, __ATOMIC_RELAXED), ring->packed.avail_wrap);
}
