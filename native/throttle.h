/* Rate limits of a device, and a lane's place at one.
 *
 * A limiter is shared by a device's lanes, which may be on several homes. A lane that finds no
 * tokens waits, with a timer of its own that makes it run again. Those that wait take turns in the
 * order in which they came, and until the last of them had its turn others wait behind: small
 * requests of one lane cannot keep another from its large one. */
#ifndef AV_THROTTLE_H
#define AV_THROTTLE_H

#include <stdint.h>

#include "lane.h"
#include "vring.h"

/* cdef begin */
/* Rates by the second, 0: no limit. See struct av_bucket. */
struct av_rates {
    uint64_t bytes;
    uint64_t bytes_burst;
    uint64_t ops;
    uint64_t ops_burst;
};

/* Any thread. No limit at first. NULL: out of memory. */
struct av_limiter;
struct av_limiter *av_limiter_create(void);
void av_limiter_destroy(struct av_limiter *limiter); /* after the lanes that use it */
void av_limiter_set(struct av_limiter *limiter, const struct av_rates *rates);
/* cdef end */

/* With the home's lock held, but for what says otherwise. */
struct av_throttle {
    struct av_limiter *limiter; /* NULL: none was ever wanted */
    int timer_fd;
    bool waiting;   /* nothing may be taken before a run in which this ends */
    uint64_t waits; /* how often it came to that */
    /* The rest with the limiter's lock held. */
    uint64_t due_ns; /* when the first that waits has its turn */
    struct av_throttle *next;
};

void av_throttle_init(struct av_throttle *throttle);
void av_throttle_fini(struct av_throttle *throttle); /* the lane is at rest */
/* Obey a limiter, borrowed, from now on. Nothing when it does already. 0 or -errno. */
int av_throttle_attach(struct av_throttle *throttle, struct av_lane *lane,
                       struct av_limiter *limiter);

void av_throttle_begin_limited(struct av_throttle *throttle);
bool av_throttle_admits_limited(struct av_throttle *throttle, const struct av_vring *ring);
void av_throttle_charge_limited(struct av_throttle *throttle, uint64_t ops, uint64_t bytes);
void av_throttle_end_limited(struct av_throttle *throttle);
void av_throttle_leave_limited(struct av_throttle *throttle);

/* A run begins to take. The clock is read here, and here alone. */
static inline void av_throttle_begin(struct av_throttle *throttle)
{
    if (throttle->limiter != NULL)
        av_throttle_begin_limited(throttle);
}

/* Whether one more may be taken, which av_throttle_charge() follows; otherwise the lane waits from
 * now on. ring: where it comes from, for there is nothing to wait for when that is empty; or
 * NULL. */
static inline bool av_throttle_admits(struct av_throttle *throttle, const struct av_vring *ring)
{
    return throttle->limiter == NULL || av_throttle_admits_limited(throttle, ring);
}

static inline void av_throttle_charge(struct av_throttle *throttle, uint64_t ops, uint64_t bytes)
{
    if (throttle->limiter != NULL)
        av_throttle_charge_limited(throttle, ops, bytes);
}

/* The run takes no more. */
static inline void av_throttle_end(struct av_throttle *throttle)
{
    if (throttle->limiter != NULL)
        av_throttle_end_limited(throttle);
}

/* The lane takes no more: it does not wait any longer. What it owes stays owed. */
static inline void av_throttle_leave(struct av_throttle *throttle)
{
    if (throttle->limiter != NULL)
        av_throttle_leave_limited(throttle);
}

#endif
