#include "rng.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/random.h>

#include "lane.h"

#define SEGMENTS_MAX 1024
/* getrandom() gives up to this much in one piece, whatever signals come. */
#define PIECE_BYTES 256u
/* What a buffer costs of the budget at least, so that empty ones cannot keep us here for ever. */
#define BUFFER_COST_BYTES 64
#define BUDGET_BYTES 65536 /* a run */

struct av_rng {
    struct av_lane lane; /* first: its home gives it back */
    struct av_vring *ring;
    struct iovec iov[SEGMENTS_MAX];
};

static struct av_rng *of(struct av_lane *lane)
{
    return (struct av_rng *)lane;
}

/* Fill one buffer, at most `room` bytes of it; how many, or -errno. */
static int64_t fill(const struct av_chain *chain, uint32_t room)
{
    uint32_t done = 0;

    for (uint32_t i = chain->readable; i < (uint32_t)chain->readable + chain->writable; i++) {
        uint8_t *at = chain->iov[i].iov_base;
        size_t left = chain->iov[i].iov_len;

        while (left != 0 && done < room) {
            size_t want = left < PIECE_BYTES ? left : PIECE_BYTES;
            ssize_t got = getrandom(at, want < room - done ? want : room - done, 0);
            if (got < 0)
                return -errno;
            at += got;
            left -= (size_t)got;
            done += (uint32_t)got;
        }
    }
    return done;
}

/* Fill one chain; what it costs of the budget, 0 when there is none, -EPROTO or -errno. */
static int64_t serve(struct av_rng *rng, uint32_t room)
{
    struct av_chain chain;
    int64_t filled;
    int result = av_vring_pop(rng->ring, &chain, rng->iov, SEGMENTS_MAX);

    if (result <= 0)
        return result;
    /* A driver may offer megabytes: a partly filled buffer is a legal answer. */
    filled = fill(&chain, room);
    if (filled >= 0)
        av_vring_push(rng->ring, chain.head, (uint32_t)filled);
    return filled >= 0 && filled < BUFFER_COST_BYTES ? BUFFER_COST_BYTES : filled;
}

static int rng_run(struct av_lane *lane, uint32_t ready)
{
    struct av_rng *rng = of(lane);
    int64_t left = BUDGET_BYTES, cost = 0;

    if (ready != 0)
        av_vring_count_kick(rng->ring);
    av_vring_kicks_off(rng->ring);
    while (lane->taking && left > 0 && (cost = serve(rng, (uint32_t)left)) > 0)
        left -= cost;
    av_vring_flush(rng->ring);
    return cost < 0 ? (int)cost : left <= 0;
}

static bool rng_arm(struct av_lane *lane)
{
    return lane->taking && av_vring_kicks_on(of(lane)->ring) != 0;
}

static bool rng_pending(struct av_lane *lane)
{
    return lane->taking && av_vring_pending(of(lane)->ring);
}

static uint64_t rng_taken(const struct av_lane *lane)
{
    return av_vring_taken(((const struct av_rng *)lane)->ring);
}

static bool rng_idle(const struct av_lane *lane)
{
    (void)lane;
    return true; /* a run ends what it begins */
}

static const struct av_lane_ops lane_ops = {
    .run = rng_run,
    .arm = rng_arm,
    .pending = rng_pending,
    .taken = rng_taken,
    .idle = rng_idle,
};

struct av_rng *av_rng_create(struct av_home *home, struct av_vring *ring, int *error)
{
    struct av_rng *rng = calloc(1, sizeof(*rng));

    *error = ENOMEM;
    if (rng == NULL)
        return NULL;
    rng->ring = ring;
    *error = -av_lane_init(&rng->lane, home, &lane_ops, 1);
    if (*error != 0) {
        free(rng);
        return NULL;
    }
    return rng;
}

void av_rng_destroy(struct av_rng *rng)
{
    av_lane_fini(&rng->lane);
    free(rng);
}

struct av_lane *av_rng_lane(struct av_rng *rng)
{
    return &rng->lane;
}
