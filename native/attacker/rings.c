/* Rings and chains that break the rules (virtio 1.3 sections 2.7 and 2.8). */
#include "attacks.h"

#define NOWHERE (1ull << 40)
#define TABLE_MAX 1100u

static volatile struct desc table[TABLE_MAX] ALIGNED(16);

/* The chain to spoil, and the piece of it that holds the data. */
struct spoilt {
    struct piece piece[PIECES_MAX];
    unsigned count, data;
};

static struct spoilt sound(struct target *target)
{
    struct spoilt spoilt;

    spoilt.count = target_chain(target, spoilt.piece, &spoilt.data);
    return spoilt;
}

static void offer(struct target *target, const struct spoilt *spoilt)
{
    ring_offer(attacked_ring(target), spoilt->piece, spoilt->count);
    target_provoke(target);
}

static void with_data_at(struct target *target, uint64_t gpa, uint32_t len)
{
    struct spoilt spoilt = sound(target);

    spoilt.piece[spoilt.data].gpa = gpa;
    spoilt.piece[spoilt.data].len = len;
    offer(target, &spoilt);
}

static void outside(struct target *target)
{
    with_data_at(target, NOWHERE, SECTOR_BYTES);
}

static void wrapping(struct target *target)
{
    with_data_at(target, UINT64_MAX - 0xff, SECTOR_BYTES);
}

static void in_pci_hole(struct target *target)
{
    with_data_at(target, PCI_MEMORY, SECTOR_BYTES);
}

static void in_ecam(struct target *target)
{
    with_data_at(target, PCI_ECAM, SECTOR_BYTES);
}

static void past_the_end(struct target *target)
{
    with_data_at(target, option_number("ram") - 64, SECTOR_BYTES);
}

static void no_bytes(struct target *target)
{
    with_data_at(target, gpa_of(memory.arena), 0);
}

static void four_gib(struct target *target)
{
    with_data_at(target, 0, UINT32_MAX);
}

/* What the device is to write is for reading, or the other way. */
static void wrong_way(struct target *target)
{
    struct spoilt spoilt = sound(target);

    spoilt.piece[spoilt.data].flags ^= WRITE;
    offer(target, &spoilt);
}

/* All of it, so that a disk has nowhere to put the status. */
static void all_readable(struct target *target)
{
    struct spoilt spoilt = sound(target);

    for (unsigned i = 0; i < spoilt.count; i++)
        spoilt.piece[i].flags &= (uint16_t)~WRITE;
    offer(target, &spoilt);
}

static void all_writable(struct target *target)
{
    struct spoilt spoilt = sound(target);

    for (unsigned i = 0; i < spoilt.count; i++)
        spoilt.piece[i].flags |= WRITE;
    offer(target, &spoilt);
}

static void writable_before_readable(struct target *target)
{
    struct spoilt spoilt = sound(target);

    spoilt.piece[spoilt.count++] = (struct piece){ gpa_of(memory.arena), 16, 0 };
    spoilt.piece[spoilt.count - 2].flags |= WRITE;
    offer(target, &spoilt);
}

/* Every descriptor of the ring says that there is another. */
static void loop(struct target *target)
{
    struct ring *ring = attacked_ring(target);
    struct piece piece = { gpa_of(memory.arena), 16, NEXT };

    if (target->kind != BLK && target->attacked == 0)
        piece.flags |= WRITE;
    for (unsigned i = 0; i < RING_SIZE; i++)
        ring_write(ring, i, &piece, (uint16_t)((i + 1) % RING_SIZE));
    ring_offer_at(ring, 0, RING_SIZE);
    target_provoke(target);
}

/* --- indirect tables ------------------------------------------------------------------- */

/* Offer a table. flags: beside INDIRECT. */
static void offer_table(struct target *target, uint64_t gpa, uint32_t len, uint16_t flags)
{
    struct piece indirect = { gpa, len, (uint16_t)(INDIRECT | flags) };
    struct ring *ring = attacked_ring(target);

    ring_write(ring, ring->next, &indirect, 0);
    ring_offer_at(ring, ring->next, 1);
    target_provoke(target);
}

/* A sound chain in a table; how many entries. */
static unsigned sound_table(struct target *target, volatile struct desc *at)
{
    struct spoilt spoilt = sound(target);

    for (unsigned i = 0; i < spoilt.count; i++) {
        struct piece piece = spoilt.piece[i];

        if (i + 1 < spoilt.count && !target->packed)
            piece.flags |= NEXT;
        table_write(at, i, target->packed, &piece, (uint16_t)(i + 1));
    }
    return spoilt.count;
}

static void table_sound(struct target *target)
{
    offer_table(target, gpa_of(table), 16 * sound_table(target, table), 0);
}

static void table_nested(struct target *target)
{
    struct piece inner = { gpa_of(table), 32, INDIRECT };

    table_write(table, 0, target->packed, &inner, 0);
    table_write(table, 1, target->packed, &inner, 0);
    offer_table(target, gpa_of(table), 32, 0);
}

static void table_misaligned(struct target *target)
{
    volatile struct desc *at = (volatile struct desc *)((volatile uint8_t *)table + 1);

    offer_table(target, gpa_of(at), 16 * sound_table(target, at), 0);
}

static void table_cut(struct target *target)
{
    offer_table(target, gpa_of(table), 16 * sound_table(target, table) - 1, 0);
}

static void table_empty(struct target *target)
{
    offer_table(target, gpa_of(table), 0, 0);
}

static void table_oversized(struct target *target)
{
    sound_table(target, table);
    offer_table(target, gpa_of(table), 16 * 1025, 0);
}

static void table_four_gib(struct target *target)
{
    offer_table(target, 0, 0xfffffff0u, 0);
}

static void table_outside(struct target *target)
{
    offer_table(target, NOWHERE, 48, 0);
}

static void table_past_the_end(struct target *target)
{
    offer_table(target, option_number("ram") - 16, 48, 0);
}

static void table_and_next(struct target *target)
{
    offer_table(target, gpa_of(table), 16 * sound_table(target, table), NEXT);
}

/* More pieces than any queue of ours holds, a byte each. */
static void table_long(struct target *target)
{
    struct piece piece = { gpa_of(memory.arena), 1, target->packed ? 0 : NEXT };

    if (target->kind != BLK && target->attacked == 0)
        piece.flags |= WRITE;
    for (unsigned i = 0; i < 400; i++)
        table_write(table, i, target->packed, &piece, (uint16_t)(i + 1));
    offer_table(target, gpa_of(table), 16 * 400, 0);
}

static void table_not_negotiated(struct target *target)
{
    target->features &= ~F_INDIRECT_DESC;
    target_open(target);
    target->features |= F_INDIRECT_DESC;
    table_sound(target);
}

static void table_loop(struct target *target)
{
    struct piece piece = { gpa_of(memory.arena), 16, NEXT };

    if (target->kind != BLK && target->attacked == 0)
        piece.flags |= WRITE;
    table_write(table, 0, false, &piece, 0);
    offer_table(target, gpa_of(table), 16 * 3, 0);
}

static void table_bad_next(struct target *target)
{
    struct piece piece = { gpa_of(memory.arena), 16, NEXT };

    if (target->kind != BLK && target->attacked == 0)
        piece.flags |= WRITE;
    table_write(table, 0, false, &piece, 999);
    offer_table(target, gpa_of(table), 16 * 3, 0);
}

/* --- one layout's own ------------------------------------------------------------------ */

static void bad_head(struct target *target)
{
    ring_offer_at(attacked_ring(target), 999, 1);
    target_provoke(target);
}

static void bad_next(struct target *target)
{
    struct spoilt spoilt = sound(target);

    spoilt.piece[0].flags |= NEXT;
    ring_write(attacked_ring(target), 0, &spoilt.piece[0], 999);
    ring_offer_at(attacked_ring(target), 0, 1);
    target_provoke(target);
}

static void index_ahead(struct target *target)
{
    attacked_ring(target)->memory->driver[1] = RING_SIZE + 1;
    target_provoke(target);
}

static void index_back(struct target *target)
{
    attacked_ring(target)->memory->driver[1] = UINT16_MAX;
    target_provoke(target);
}

static void bad_id(struct target *target)
{
    struct spoilt spoilt = sound(target);
    struct ring *ring = attacked_ring(target);

    for (unsigned i = 0; i < spoilt.count; i++) {
        if (i + 1 < spoilt.count)
            spoilt.piece[i].flags |= NEXT;
        ring_write(ring, i, &spoilt.piece[i], 999);
    }
    ring_offer_at(ring, 0, (uint16_t)spoilt.count);
    target_provoke(target);
}

#define SPLIT 1u
#define PACKED 2u
#define BOTH (SPLIT | PACKED)

static const struct {
    const char *name;
    void (*spoil)(struct target *target);
    unsigned layouts;
} attacks[] = {
    { "outside", outside, BOTH },
    { "wrapping", wrapping, BOTH },
    { "in-pci-hole", in_pci_hole, BOTH },
    { "in-ecam", in_ecam, BOTH },
    { "past-the-end", past_the_end, BOTH },
    { "no-bytes", no_bytes, BOTH },
    { "four-gib", four_gib, BOTH },
    { "wrong-way", wrong_way, BOTH },
    { "all-readable", all_readable, BOTH },
    { "all-writable", all_writable, BOTH },
    { "writable-before-readable", writable_before_readable, BOTH },
    { "loop", loop, BOTH },
    { "table-sound", table_sound, BOTH },
    { "table-nested", table_nested, BOTH },
    { "table-misaligned", table_misaligned, BOTH },
    { "table-cut", table_cut, BOTH },
    { "table-empty", table_empty, BOTH },
    { "table-oversized", table_oversized, BOTH },
    { "table-four-gib", table_four_gib, BOTH },
    { "table-outside", table_outside, BOTH },
    { "table-past-the-end", table_past_the_end, BOTH },
    { "table-and-next", table_and_next, BOTH },
    { "table-long", table_long, BOTH },
    { "table-not-negotiated", table_not_negotiated, BOTH },
    { "table-loop", table_loop, SPLIT },
    { "table-bad-next", table_bad_next, SPLIT },
    { "bad-head", bad_head, SPLIT },
    { "bad-next", bad_next, SPLIT },
    { "index-ahead", index_ahead, SPLIT },
    { "index-back", index_back, SPLIT },
    { "bad-id", bad_id, PACKED },
};

void attack_rings(struct target *target)
{
    for (unsigned i = 0; i < COUNT(attacks); i++) {
        if (!(attacks[i].layouts & (target->packed ? PACKED : SPLIT)))
            continue;
        target_open(target);
        attacks[i].spoil(target);
        target_outcome(target, attacks[i].name);
    }
    target_check(target);
}
