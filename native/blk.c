#include "blk_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>

#define KICK 0u /* source number */

/* Take one chain; 1 taken, 0 none or no free slot, -EPROTO. */
static int take(struct av_blk *blk)
{
    struct av_blk_slot *slot = blk->free;
    struct av_chain chain;
    uint8_t status;
    int result, fault;

    if (slot == NULL || !blk->lane.taking)
        return 0;
    result = av_vring_pop(blk->ring, &chain, slot->iov, blk->iov_max);
    if (result <= 0)
        return result;
    blk->free = slot->next_free;
    blk->in_flight++;
    slot->head = chain.head;
    slot->range = 0;
    slot->done = 0;
    slot->req.type = UINT32_MAX;
    fault = av_blk_req_parse(&chain, &blk->limits, &slot->req, &status);
    if (fault != AV_FAULT_NONE) {
        av_vring_fail(blk->ring, fault);
        slot->next_free = blk->free;
        blk->free = slot;
        blk->in_flight--;
        return -EPROTO;
    }
    if (status != AV_BLK_S_OK)
        av_blk_finish(blk, slot, status);
    else
        av_blk_perform(blk, slot);
    return 1;
}

/* Take and start up to a device's depth of requests; 1 when the ring may hold more. */
static int serve(struct av_blk *blk)
{
    uint32_t budget = blk->config.depth;
    int result;

    av_vring_kicks_off(blk->ring);
    while ((result = take(blk)) > 0)
        if (--budget == 0)
            return 1;
    return result;
}

/* Submit what is queued and complete what is done, until nothing more is queued. */
static int settle(struct av_blk *blk)
{
    int result = 0;

    do {
        if (blk->queued != 0) {
            blk->queued = 0;
            blk->stats.batches++;
            result = blk->engine->ops->submit(blk->engine);
            if (result < 0)
                return result;
        }
        blk->engine->ops->reap(blk->engine, av_blk_op_done, blk);
    } while (blk->queued != 0);
    return 0;
}

static struct av_blk *of(struct av_lane *lane)
{
    return (struct av_blk *)lane;
}

/* Whether chains may be taken, and there is a slot for one. */
static bool can_take(const struct av_blk *blk)
{
    return blk->lane.taking && blk->free != NULL;
}

static int blk_run(struct av_lane *lane, uint32_t ready)
{
    struct av_blk *blk = of(lane);
    int more, result;

    if (ready & 1u << KICK)
        av_vring_count_kick(blk->ring);
    more = serve(blk);
    result = settle(blk);
    av_vring_flush(blk->ring);
    if (result < 0 || more < 0)
        return result < 0 ? result : more;
    /* Chains that waited for a slot may have one by now. */
    return can_take(blk) && (more || av_vring_pending(blk->ring));
}

static bool blk_arm(struct av_lane *lane)
{
    struct av_blk *blk = of(lane);
    bool more = blk->engine->ops->arm(blk->engine);

    /* Without a free slot the next completion goes on with the ring, not a kick. */
    if (can_take(blk))
        more |= av_vring_kicks_on(blk->ring) != 0;
    return more;
}

static bool blk_pending(struct av_lane *lane)
{
    struct av_blk *blk = of(lane);

    return (can_take(blk) && av_vring_pending(blk->ring)) || blk->engine->ops->ready(blk->engine);
}

static bool blk_idle(const struct av_lane *lane)
{
    return ((const struct av_blk *)lane)->in_flight == 0;
}

static const struct av_lane_ops lane_ops = {
    .run = blk_run,
    .arm = blk_arm,
    .pending = blk_pending,
    .idle = blk_idle,
};

static int allocate(struct av_blk *blk)
{
    uint32_t depth = blk->config.depth;

    blk->slots = calloc(depth, sizeof(*blk->slots));
    blk->iovs = calloc((size_t)depth * blk->iov_max, sizeof(*blk->iovs));
    if (blk->slots == NULL || blk->iovs == NULL)
        return ENOMEM;
    for (uint32_t i = 0; i < depth; i++) {
        blk->slots[i].iov = blk->iovs + (size_t)i * blk->iov_max;
        blk->slots[i].next_free = blk->free;
        blk->free = &blk->slots[i];
    }
    return 0;
}

static int set_up(struct av_blk *blk, const struct av_blk_config *config, struct av_home *home)
{
    int error = allocate(blk);

    if (error != 0)
        return error;
    blk->engine = config->engine == AV_BLK_IO_URING
                      ? av_blk_uring_create(config->fd, config->depth, &error)
                      : av_blk_threads_create(config->fd, config->depth, &error);
    if (blk->engine == NULL)
        return error;
    error = -av_lane_init(&blk->lane, home, &lane_ops, 1);
    if (error == 0)
        av_lane_add_source(&blk->lane, blk->engine->event_fd, EPOLLIN);
    return error;
}

struct av_blk *av_blk_create(const struct av_blk_config *config, struct av_home *home,
                             struct av_vring *ring, int *error)
{
    struct av_blk *blk = calloc(1, sizeof(*blk));

    if (blk == NULL) {
        *error = ENOMEM;
        return NULL;
    }
    blk->config = *config;
    blk->ring = ring;
    blk->iov_max = config->seg_max + 2; /* header and status */
    blk->limits = (struct av_blk_limits){
        .capacity_sectors = config->capacity_sectors,
        .read_only = config->read_only,
        .discard = config->discard,
        .write_zeroes = config->write_zeroes,
    };
    *error = set_up(blk, config, home);
    if (*error != 0) {
        av_blk_destroy(blk);
        return NULL;
    }
    return blk;
}

void av_blk_destroy(struct av_blk *blk)
{
    if (blk == NULL)
        return;
    av_lane_fini(&blk->lane);
    if (blk->engine != NULL)
        blk->engine->ops->destroy(blk->engine);
    free(blk->slots);
    free(blk->iovs);
    free(blk);
}

struct av_lane *av_blk_lane(struct av_blk *blk)
{
    return &blk->lane;
}

void av_blk_set_writeback(struct av_blk *blk, int writeback)
{
    av_lane_lock(&blk->lane);
    blk->config.writeback = writeback != 0;
    av_lane_unlock(&blk->lane);
}

void av_blk_set_capacity(struct av_blk *blk, uint64_t sectors)
{
    av_lane_lock(&blk->lane);
    blk->limits.capacity_sectors = sectors;
    av_lane_unlock(&blk->lane);
}

void av_blk_statistics(struct av_blk *blk, struct av_blk_stats *out)
{
    av_lane_lock(&blk->lane);
    *out = blk->stats;
    av_lane_unlock(&blk->lane);
}
