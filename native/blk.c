#include "blk_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

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

struct av_blk *av_blk_create(const struct av_blk_config *config, int *error)
{
    struct av_blk *blk = calloc(1, sizeof(*blk));

    if (blk == NULL) {
        *error = ENOMEM;
        return NULL;
    }
    blk->config = *config;
    blk->iov_max = config->seg_max + 2; /* header and status */
    blk->limits = (struct av_blk_limits){
        .capacity_sectors = config->capacity_sectors,
        .read_only = config->read_only,
        .discard = config->discard,
        .write_zeroes = config->write_zeroes,
    };
    *error = allocate(blk);
    if (*error == 0)
        blk->engine = config->engine == AV_BLK_IO_URING
                          ? av_blk_uring_create(config->fd, config->depth, error)
                          : av_blk_threads_create(config->fd, config->depth, error);
    if (blk->engine == NULL) {
        av_blk_destroy(blk);
        return NULL;
    }
    return blk;
}

void av_blk_destroy(struct av_blk *blk)
{
    if (blk == NULL)
        return;
    if (blk->engine != NULL)
        blk->engine->ops->destroy(blk->engine);
    free(blk->slots);
    free(blk->iovs);
    free(blk);
}

int av_blk_event_fd(const struct av_blk *blk)
{
    return blk->engine->event_fd;
}

void av_blk_hold(struct av_blk *blk, int held)
{
    blk->held = held != 0;
}

uint32_t av_blk_in_flight(const struct av_blk *blk)
{
    return blk->in_flight;
}

void av_blk_set_writeback(struct av_blk *blk, int writeback)
{
    blk->config.writeback = writeback != 0;
}

void av_blk_set_capacity(struct av_blk *blk, uint64_t sectors)
{
    blk->limits.capacity_sectors = sectors;
}

void av_blk_statistics(const struct av_blk *blk, struct av_blk_stats *out)
{
    *out = blk->stats;
}

int av_blk_attach(struct av_blk *blk, struct av_vring *ring)
{
    if (blk->queue_count == AV_BLK_QUEUES_MAX)
        return -ENOSPC;
    blk->queue[blk->queue_count].ring = ring;
    return (int)blk->queue_count++;
}

/* Take one chain; 1 taken, 0 none or no free slot, -EPROTO. */
static int take(struct av_blk *blk, struct av_vring *ring)
{
    struct av_blk_slot *slot = blk->free;
    struct av_chain chain;
    uint8_t status;
    int result, fault;

    if (slot == NULL || blk->held)
        return 0;
    result = av_vring_pop(ring, &chain, slot->iov, blk->iov_max);
    if (result <= 0)
        return result;
    blk->free = slot->next_free;
    blk->in_flight++;
    slot->ring = ring;
    slot->head = chain.head;
    slot->range = 0;
    slot->done = 0;
    slot->req.type = UINT32_MAX;
    fault = av_blk_req_parse(&chain, &blk->limits, &slot->req, &status);
    if (fault != AV_FAULT_NONE) {
        av_vring_fail(ring, fault);
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

/* Take and start up to a device's depth of requests; 1 when the ring may hold more. */
static int serve(struct av_blk *blk, struct av_blk_queue *queue)
{
    uint32_t budget = blk->config.depth;
    int result, more;

    queue->starved = false;
    do {
        av_vring_kicks_off(queue->ring);
        while ((result = take(blk, queue->ring)) > 0)
            if (--budget == 0)
                return 1;
        if (result < 0)
            return result;
        more = av_vring_kicks_on(queue->ring);
        /* The driver does not kick again for what it already offered. */
        queue->starved = more && (blk->free == NULL || blk->held);
    } while (more && !queue->starved);
    return 0;
}

static int serve_starved(struct av_blk *blk)
{
    int result, more = 0;

    for (uint32_t i = 0; i < blk->queue_count; i++) {
        if (!blk->queue[i].starved || blk->free == NULL || blk->held)
            continue;
        result = serve(blk, &blk->queue[i]);
        if (result < 0)
            return result;
        more |= result | blk->queue[i].starved;
    }
    return more;
}

/* The end of every call: I/O under way, results in the rings, drivers told. */
static int turn(struct av_blk *blk, int more)
{
    int result = settle(blk), starved = 0;

    if (result == 0 && more >= 0) {
        starved = serve_starved(blk);
        result = settle(blk);
    }
    for (uint32_t i = 0; i < blk->queue_count; i++)
        av_vring_flush(blk->queue[i].ring);
    if (result < 0)
        return result;
    if (more < 0 || starved < 0)
        return more < 0 ? more : starved;
    return more || (starved && blk->free != NULL);
}

int av_blk_kick(struct av_blk *blk, uint32_t queue, int kick_fd)
{
    if (queue >= blk->queue_count)
        return -EINVAL;
    av_vring_take_kick(blk->queue[queue].ring, kick_fd);
    return turn(blk, serve(blk, &blk->queue[queue]));
}

int av_blk_complete(struct av_blk *blk)
{
    uint64_t events;

    if (read(blk->engine->event_fd, &events, sizeof(events)) < 0 && errno != EAGAIN)
        return -errno;
    return turn(blk, 0);
}
