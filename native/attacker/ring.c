#include "ring.h"

void ring_clear(struct ring *ring, const struct device *device, unsigned queue, bool packed,
                volatile struct ring_memory *memory)
{
    fill(memory, 0, sizeof(*memory));
    *ring = (struct ring){ .hardware = device, .queue = queue, .packed = packed,
                           .memory = memory, .wrap = true, .seen_wrap = true };
}

struct place ring_place(const struct ring *ring)
{
    return (struct place){ .size = RING_SIZE,
                           .desc = gpa_of(ring->memory->desc),
                           .driver = gpa_of(ring->memory->driver),
                           .device = gpa_of(&ring->memory->device) };
}

void ring_open(struct ring *ring)
{
    struct place place = ring_place(ring);

    device_set_place(ring->hardware, ring->queue, &place);
    device_enable(ring->hardware, ring->queue);
}

/* The flags with those that make it available, which a packed descriptor is by itself. */
static uint16_t packed_flags(const struct ring *ring, unsigned index, uint16_t flags)
{
    bool wrap = index >= ring->next ? ring->wrap : !ring->wrap;

    return (uint16_t)(flags | (wrap ? AVAIL : USED));
}

void ring_write(struct ring *ring, unsigned index, const struct piece *piece, uint16_t link)
{
    volatile struct desc *desc = &ring->memory->desc[index];

    desc->gpa = piece->gpa;
    desc->len = piece->len;
    desc->third = ring->packed ? link : piece->flags;
    /* Of the first of a chain, ring_offer_at() shows them. */
    if (!ring->packed)
        desc->fourth = link;
    else if (index != ring->next)
        desc->fourth = packed_flags(ring, index, piece->flags);
    else
        desc->fourth = (uint16_t)(piece->flags | (ring->wrap ? USED : AVAIL));
}

void ring_offer_at(struct ring *ring, uint16_t head, uint16_t count)
{
    volatile struct ring_memory *memory = ring->memory;
    unsigned after = ring->next + count;

    if (ring->packed) {
        memory->desc[ring->next].fourth ^= AVAIL | USED;
    } else {
        memory->driver[2 + ring->offered % RING_SIZE] = head;
        memory->driver[1] = (uint16_t)(ring->offered + 1);
    }
    ring->length[ring->next] = count;
    ring->offered++;
    if (after >= RING_SIZE)
        ring->wrap = !ring->wrap;
    ring->next = (uint16_t)(after % RING_SIZE);
}

void ring_offer(struct ring *ring, const struct piece *piece, unsigned count)
{
    uint16_t head = ring->next;

    for (unsigned i = 0; i < count; i++) {
        struct piece linked = piece[i];
        unsigned index = (head + i) % RING_SIZE;

        if (i + 1 < count)
            linked.flags |= NEXT;
        ring_write(ring, index, &linked, ring->packed ? head : (uint16_t)((index + 1) % RING_SIZE));
    }
    ring_offer_at(ring, head, (uint16_t)count);
}

static bool take_packed(struct ring *ring, uint32_t *len)
{
    volatile struct desc *desc = &ring->memory->desc[ring->seen];
    uint16_t flags = desc->fourth;
    unsigned after;

    if (((flags & AVAIL) != 0) != ring->seen_wrap || ((flags & USED) != 0) != ring->seen_wrap)
        return false;
    *len = desc->len;
    after = ring->seen + ring->length[desc->third % RING_SIZE];
    if (after >= RING_SIZE)
        ring->seen_wrap = !ring->seen_wrap;
    ring->seen = (uint16_t)(after % RING_SIZE);
    return true;
}

bool ring_take(struct ring *ring, uint32_t *len)
{
    if (ring->packed)
        return take_packed(ring, len);
    if (ring->memory->device.idx == ring->seen)
        return false;
    *len = ring->memory->device.ring[ring->seen++ % RING_SIZE].len;
    return true;
}

void table_write(volatile struct desc *table, unsigned index, bool packed,
                 const struct piece *piece, uint16_t next)
{
    volatile struct desc *desc = &table[index];

    desc->gpa = piece->gpa;
    desc->len = piece->len;
    desc->third = packed ? 0 : piece->flags;
    desc->fourth = packed ? piece->flags : next;
}
