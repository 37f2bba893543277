/* Sound chains that ask for what cannot be. */
#include "attacks.h"

#define FAR (1ull << 40)
#define RANGE_BYTES 16u
#define RANGES_MAX 32u

struct range {
    uint64_t sector;
    uint32_t sectors, flags;
};

static volatile struct range ranges[RANGES_MAX + 1];

static void blk(struct target *target, const char *name, uint32_t type, uint64_t sector,
                uint32_t header_bytes, uint32_t data_bytes)
{
    struct piece piece[PIECES_MAX];

    target_open(target);
    blk_chain(piece, type, sector, 0);
    piece[0].len = header_bytes;
    piece[1].len = data_bytes;
    if (data_bytes == 0)
        piece[1] = piece[2];
    if (type == BLK_T_GET_ID)
        piece[1].flags |= WRITE;
    ring_offer(&target->ring[0], piece, data_bytes == 0 ? 2 : 3);
    target_provoke(target);
    target_outcome(target, name);
}

static void blk_range(struct target *target, const char *name, uint32_t type,
                      const struct range *range, uint32_t bytes)
{
    struct piece piece[PIECES_MAX];

    target_open(target);
    for (unsigned i = 0; i < COUNT(ranges); i++) {
        ranges[i].sector = range->sector;
        ranges[i].sectors = range->sectors;
        ranges[i].flags = range->flags;
    }
    blk_chain(piece, type, 0, 0);
    piece[1] = (struct piece){ gpa_of(ranges), bytes, 0 };
    ring_offer(&target->ring[0], piece, 3);
    target_provoke(target);
    target_outcome(target, name);
}

/* The disk's bytes over the descriptors that say so. */
static void onto_the_ring(struct target *target)
{
    struct piece piece[PIECES_MAX];

    target_open(target);
    blk_chain(piece, BLK_T_IN, 0, 0);
    piece[1].gpa = gpa_of(&memory.ring[0]);
    ring_offer(&target->ring[0], piece, 3);
    target_provoke(target);
    device_reset(&target->device);
    say("onto-the-ring", "reset");
}

static void blk_requests(struct target *target)
{
    const struct range far = { FAR, 1, 0 }, wrapping = { UINT64_MAX, UINT32_MAX, 0 };
    const struct range flags = { 0, 1, 0xff };

    blk(target, "read-far", BLK_T_IN, FAR, 16, SECTOR_BYTES);
    blk(target, "read-wrapping", BLK_T_IN, UINT64_MAX, 16, SECTOR_BYTES);
    blk(target, "read-part-of-a-sector", BLK_T_IN, 0, 16, 100);
    blk(target, "read-nothing", BLK_T_IN, 0, 16, 0);
    blk(target, "write-far", BLK_T_OUT, FAR, 16, SECTOR_BYTES);
    blk(target, "write-part-of-a-sector", BLK_T_OUT, 0, 16, 100);
    blk(target, "write-nothing", BLK_T_OUT, 0, 16, 0);
    blk(target, "half-a-header", BLK_T_IN, 0, 8, SECTOR_BYTES);
    blk(target, "unknown-type", 77, 0, 16, SECTOR_BYTES);
    blk(target, "id-of-five-bytes", BLK_T_GET_ID, 0, 16, 5);
    blk(target, "flush-with-data", BLK_T_FLUSH, 0, 16, SECTOR_BYTES);
    blk_range(target, "zero-far", BLK_T_WRITE_ZEROES, &far, RANGE_BYTES);
    blk_range(target, "zero-wrapping", BLK_T_WRITE_ZEROES, &wrapping, RANGE_BYTES);
    blk_range(target, "zero-unknown-flags", BLK_T_WRITE_ZEROES, &flags, RANGE_BYTES);
    blk_range(target, "zero-half-a-range", BLK_T_WRITE_ZEROES, &far, RANGE_BYTES / 2);
    blk_range(target, "zero-too-many", BLK_T_WRITE_ZEROES, &far, sizeof(ranges));
    blk_range(target, "discard-far", BLK_T_DISCARD, &far, RANGE_BYTES);
    onto_the_ring(target);
}

/* --- packets --------------------------------------------------------------------------- */

/* Spoils the sound packet by writing `value` at `offset` of it. */
static void packet(struct target *target, const char *name, unsigned offset, unsigned bytes,
                   uint8_t value)
{
    struct piece piece[PIECES_MAX];
    unsigned data;

    target_open(target);
    target_chain(target, piece, &data);
    fill((volatile uint8_t *)piece[0].gpa + offset, value, bytes);
    ring_offer(attacked_ring(target), piece, 1);
    target_provoke(target);
    target_outcome(target, name);
}

static void sized(struct target *target, const char *name, uint64_t gpa, uint32_t bytes)
{
    struct piece piece = { gpa, bytes, 0 };

    target_open(target);
    ring_offer(attacked_ring(target), &piece, 1);
    target_provoke(target);
    target_outcome(target, name);
}

/* All of a ring's packets at once, again and again, with no room for answers. */
static void unanswered(struct target *target)
{
    struct piece piece[PIECES_MAX];
    unsigned data;
    uint32_t len;

    target_open(target);
    for (unsigned round = 0; round < 32; round++) {
        for (unsigned i = 0; i < RING_SIZE; i++) {
            target_chain(target, piece, &data);
            ring_offer(attacked_ring(target), piece, 1);
        }
        target_provoke(target);
        /* After some more than 256 of them the device waits for room (5.10.6.1). */
        for (unsigned i = 0; i < RING_SIZE && round < 16; i++)
            target_await(target, &len);
    }
    device_reset(&target->device);
    say("unanswered", "reset");
}

static void vsock_packets(struct target *target)
{
    packet(target, "unknown-sender", 0, 8, 0x55);
    packet(target, "unknown-receiver", 8, 8, 0x55);
    packet(target, "unknown-type", 28, 2, 0x55);
    packet(target, "unknown-operation", 30, 2, 0x55);
    packet(target, "payload-missing", 24, 1, 100);
    packet(target, "payload-of-four-gib", 24, 4, 0xff);
    packet(target, "data-without-a-stream", 30, 1, 5);
    sized(target, "half-a-header", gpa_of(memory.arena), 20);
    sized(target, "all-of-memory", 0, (uint32_t)option_number("ram"));
    unanswered(target);
}

static void net_packets(struct target *target)
{
    packet(target, "header-of-ones", 0, 12, 0xff);
    packet(target, "checksum-far", 0, 1, 1);
    packet(target, "segments-of-nothing", 1, 1, 1);
    sized(target, "half-a-header", gpa_of(memory.arena), 6);
    sized(target, "header-only", gpa_of(memory.arena), 12);
    sized(target, "one-byte", gpa_of(memory.arena), 13);
    sized(target, "all-of-memory", 0, (uint32_t)option_number("ram"));
}

void attack_requests(struct target *target)
{
    if (target->kind == BLK)
        blk_requests(target);
    else if (target->kind == NET)
        net_packets(target);
    else
        vsock_packets(target);
    target_check(target);
}
