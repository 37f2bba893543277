/* The driver's side of a virtqueue, split or packed (virtio 1.3 sections 2.7 and 2.8), which can
 * also be written wrongly. */
#ifndef RING_H
#define RING_H

#include "device.h"

#define RING_SIZE 16u

#define NEXT 1u
#define WRITE 2u
#define INDIRECT 4u
#define AVAIL 0x80u  /* of a packed descriptor */
#define USED 0x8000u

struct desc {
    uint64_t gpa;
    uint32_t len;
    uint16_t third;  /* split: flags; packed: id */
    uint16_t fourth; /* split: next; packed: flags */
};

/* What a chain is made of; flags: all but NEXT between the pieces, which is added. */
struct piece {
    uint64_t gpa;
    uint32_t len;
    uint16_t flags;
};

/* In memory that the device knows. */
struct ring_memory {
    struct desc desc[RING_SIZE] ALIGNED(16);
    uint16_t driver[3 + RING_SIZE] ALIGNED(4);
    struct {
        uint16_t flags, idx;
        struct {
            uint32_t id, len;
        } ring[RING_SIZE];
        uint16_t event;
    } device ALIGNED(4);
};

struct ring {
    const struct device *hardware;
    unsigned queue;
    bool packed;
    volatile struct ring_memory *memory;
    uint16_t next;  /* descriptor that is written next */
    bool wrap;
    uint16_t offered; /* chains, modulo 2^16 */
    uint16_t seen;    /* of the used ones: chains, or the packed ring's place */
    bool seen_wrap;
    uint16_t length[RING_SIZE]; /* descriptors of the chain that began there */
};

/* Clear its memory, and tell the device, or not. */
void ring_clear(struct ring *ring, const struct device *device, unsigned queue, bool packed,
                volatile struct ring_memory *memory);
struct place ring_place(const struct ring *ring);
void ring_open(struct ring *ring);
/* Write descriptor `index` whatever it says. link: the next one's index, or the id. */
void ring_write(struct ring *ring, unsigned index, const struct piece *piece, uint16_t link);
/* Tell the device of a chain that begins at `head` and takes `count` descriptors. */
void ring_offer_at(struct ring *ring, uint16_t head, uint16_t count);
/* A chain as it should be: written, and offered. */
void ring_offer(struct ring *ring, const struct piece *piece, unsigned count);
/* Whether the next chain came back, and what was written to it. */
bool ring_take(struct ring *ring, uint32_t *len);
/* An entry of an indirect table. */
void table_write(volatile struct desc *table, unsigned index, bool packed,
                 const struct piece *piece, uint16_t next);

#endif
