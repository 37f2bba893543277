/* What the sources of the ring share: vring.c (life, dispatch), vring_split.c and vring_packed.c
 * (one layout each), vring_chain.h (the checks of descriptors). */
#ifndef AV_VRING_INTERNAL_H
#define AV_VRING_INTERNAL_H

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>

#include "counter.h"
#include "vring.h"

/* Both layouts' flags of a descriptor. */
#define AV_DESC_NEXT 1u
#define AV_DESC_WRITE 2u
#define AV_DESC_INDIRECT 4u

/* The layouts of virtio 1.3 sections 2.7.5, 2.7.6, 2.7.8 and 2.8.13, little-endian as the host is.
 * A descriptor's second half is one word: it is read at one moment, and written in one piece. */
struct av_desc {
    uint64_t gpa;
    uint64_t rest; /* 32 bits of length, then: split 16 of flags, 16 of next; packed 16 of id, 16 of
                      flags */
};

struct av_avail {
    uint16_t flags;
    uint16_t idx;
    uint16_t ring[]; /* then used_event */
};

struct av_used_elem {
    uint32_t id;
    uint32_t len;
};

struct av_used {
    uint16_t flags;
    uint16_t idx;
    struct av_used_elem ring[]; /* then avail_event */
};

_Static_assert(sizeof(struct av_desc) == 16, "descriptor");
_Static_assert(sizeof(struct av_avail) == 4, "available ring head");
_Static_assert(sizeof(struct av_used_elem) == 8, "used element");
_Static_assert(sizeof(struct av_used) == 4, "used ring head");

struct av_split {
    const struct av_desc *desc;
    struct av_avail *avail;
    struct av_used *used;
    uint16_t avail_seen; /* avail->idx as last read and checked */
    uint16_t published;  /* used->idx as the driver sees it */
    uint16_t last;       /* IN_ORDER: where the last used element went */
};

struct av_packed {
    struct av_desc *desc;
    const uint32_t *driver_event;
    uint32_t *device_event;
    uint32_t kicks;      /* device_event as we last wrote it */
    uint16_t in_flight;  /* descriptors taken and not given back */
    uint16_t popped;     /* chains taken so far: where `order` goes on */
    bool avail_wrap;     /* the driver's wrap counter as of next_avail */
    bool used_wrap;      /* ours as of next_used */
    uint16_t batch;      /* descriptors given back and not shown yet: a batch */
    uint16_t first;      /* where the batch's first used descriptor goes, */
    bool first_wrap;     /* and our wrap counter there */
    uint64_t first_rest; /* and what goes there last of all, by which the driver sees them */
    uint16_t shown;      /* where the first batch went that no interrupt was considered for, */
    bool shown_wrap;     /* and our wrap counter there */
    uint16_t last;       /* IN_ORDER: as in struct av_split, */
    bool last_wrap;      /* and our wrap counter there */
    uint16_t order[AV_VRING_SIZE_MAX]; /* the ids of chains as they were taken, a ring */
};

/* A chain in flight, by its head or id. */
struct av_taken {
    uint16_t descs;          /* packed: how many of the ring's descriptors it takes; 0: none */
    uint32_t writable_bytes; /* IN_ORDER */
};

/* See vring_inflight.c. */
struct av_inflight_region;
struct av_inflight {
    struct av_inflight_region *region; /* NULL: none is kept */
    uint64_t counter;                  /* the next chain's */
    uint16_t again_at, agains;         /* chains of another process still to be taken */
    uint16_t batched;                  /* chains given back since the last flush */
    uint16_t again[AV_VRING_SIZE_MAX];
    uint16_t batch[AV_VRING_SIZE_MAX];
};

struct av_vring {
    const struct av_gmem *mem;
    const struct av_gmem_region *near; /* where the last address was found */
    struct av_interrupt *interrupt;
    bool running;
    bool is_packed;
    bool event_idx;
    bool indirect;
    bool in_order;
    bool last_whole; /* IN_ORDER: the last used buffer may be skipped */
    uint16_t size;
    /* These two are read by av_vring_statistics(), on any thread: they change in one store. */
    uint16_t next_avail; /* next chain to take: split an index, packed an offset */
    uint16_t next_used;  /* next used element to fill; likewise */
    uint16_t shown;      /* by publish(), and not looked at for an interrupt yet */
    int fault;
    struct av_vring_stats stats;
    struct av_split split;
    struct av_packed packed;
    struct av_taken taken[AV_VRING_SIZE_MAX];
    struct av_inflight inflight;
};

static inline uint16_t av_load16(const uint16_t *at)
{
    return __atomic_load_n(at, __ATOMIC_RELAXED);
}

static inline void av_store16(uint16_t *at, uint16_t value)
{
    __atomic_store_n(at, value, __ATOMIC_RELAXED);
}

static inline int av_vring_break(struct av_vring *ring, int fault)
{
    __atomic_store_n(&ring->fault, fault, __ATOMIC_RELAXED);
    return -EPROTO;
}

/* What each layout does for the function of the same name in vring.h. publish() shows what was
 * pushed and says how much that is; wants_interrupt(): whether the driver asked for an interrupt
 * for any of the `published` last ones; kicks(): ask for kicks or for none. */
int av_vring_split_start(struct av_vring *ring, const struct av_vring_setup *setup);
uint32_t av_vring_split_base(const struct av_vring *ring);
int av_vring_split_pop(struct av_vring *ring, struct av_chain *out, struct iovec *iov,
                       uint32_t iov_max);
void av_vring_split_unpop(struct av_vring *ring);
void av_vring_split_push(struct av_vring *ring, uint16_t head, uint32_t written_bytes);
uint16_t av_vring_split_publish(struct av_vring *ring);
bool av_vring_split_wants_interrupt(const struct av_vring *ring, uint16_t published);
void av_vring_split_kicks(struct av_vring *ring, bool on);
bool av_vring_split_pending(const struct av_vring *ring);

/* Only while there is a region. start(): after the ring's own; NULL: there is none. publish():
 * after the ring's own. */
void av_inflight_start(struct av_vring *ring, void *memory);
void av_inflight_take(struct av_vring *ring, uint16_t head);
void av_inflight_push(struct av_vring *ring, uint16_t head);
void av_inflight_publish(struct av_vring *ring);

int av_vring_packed_start(struct av_vring *ring, const struct av_vring_setup *setup);
uint32_t av_vring_packed_base(const struct av_vring *ring);
int av_vring_packed_pop(struct av_vring *ring, struct av_chain *out, struct iovec *iov,
                        uint32_t iov_max);
void av_vring_packed_unpop(struct av_vring *ring);
void av_vring_packed_push(struct av_vring *ring, uint16_t head, uint32_t written_bytes);
uint16_t av_vring_packed_publish(struct av_vring *ring);
bool av_vring_packed_wants_interrupt(const struct av_vring *ring, uint16_t published);
void av_vring_packed_kicks(struct av_vring *ring, bool on);
bool av_vring_packed_pending(const struct av_vring *ring);

#endif
