/* The device under attack, with a driver that can also behave. */
#ifndef TARGET_H
#define TARGET_H

#include "ring.h"

#define ARENA_BYTES 0x4000u
#define GUARD_BYTES 0x1000u
#define GUARD 0x5a
#define PIECES_MAX 4u

#define BLK_T_IN 0u
#define BLK_T_OUT 1u
#define BLK_T_FLUSH 4u
#define BLK_T_GET_ID 8u
#define BLK_T_DISCARD 11u
#define BLK_T_WRITE_ZEROES 13u
#define SECTOR_BYTES 512u

struct blk_header {
    uint32_t type, reserved;
    uint64_t sector;
};

enum kind { BLK, NET, VSOCK };

/* attacked: the queue whose chains are wrong. write: of a disk, its chains write. */
struct target {
    struct device device;
    enum kind kind;
    bool packed;
    bool write;
    unsigned attacked;
    uint64_t features;
    unsigned queues;
    struct ring ring[2];
};

/* All that devices may touch: `arena` is theirs, and what is around it is not. */
struct memory {
    uint8_t before[GUARD_BYTES];
    uint8_t arena[ARENA_BYTES];
    uint8_t between[GUARD_BYTES];
    struct ring_memory ring[2] ALIGNED(4096);
    uint8_t after[GUARD_BYTES] ALIGNED(4096);
};
extern volatile struct memory memory;

/* As the command line says: transport, slot, kind, ring, queue. */
void target_find(struct target *target);
/* Reset it and set it up soundly, rings empty. */
void target_open(struct target *target);
struct ring *attacked_ring(struct target *target);
/* A sound chain for the attacked queue; how many pieces, and which of them holds the data. */
unsigned target_chain(const struct target *target, struct piece *piece, unsigned *data);
/* Make the device look at the attacked queue. */
void target_provoke(struct target *target);
/* What becomes of a chain that was offered: waits until it is used, or the device needs a reset.
 * True when it was used. */
bool target_await(struct target *target, uint32_t *len);
/* Say what became of it. */
void target_outcome(struct target *target, const char *name);
/* Sound requests; whether they were answered as they should be. */
bool target_works(struct target *target);
/* Say whether it works, after a reset, and whether the guards are whole. */
void target_check(struct target *target);
/* A transfer of one sector between disk and arena. */
void blk_chain(struct piece *piece, uint32_t type, uint64_t sector, unsigned slot);
uint8_t blk_status(unsigned slot);

#endif
