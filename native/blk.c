#include "blk_internal.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define KICK 0u /* source number */
/* A portion of a run: what is started by one submission, and shown to the driver before the next,
 * so that it works on that while we go on. */
#define PORTION_REQUESTS 8u
#define PORTION_BYTES (256u << 10)
/* What a run takes at most, about 100 us of copying where all is in the page cache. */
#define RUN_BYTES (1u << 20)
#define SETTLE_ROUNDS 4u

/* Whether one more request may be in flight. */
static bool has_room(const struct av_blk *blk)
{
    return blk->free != NULL && blk->copied_bytes < blk->config.copy_max_bytes;
}

/* Take one chain; 1 taken, 0 none or no room, -EPROTO. bytes: adds those that are transferred. */
static int take(struct av_blk *blk, uint64_t *bytes)
{
    struct av_blk_slot *slot = blk->free;
    struct av_chain chain;
    uint32_t transferred;
    uint8_t status;
    int result, fault;

    if (!has_room(blk) || !blk->lane.taking || !av_throttle_admits(&blk->throttle, blk->ring))
        return 0;
    result = av_vring_pop(blk->ring, &chain, slot->iov, blk->iov_max);
    if (result <= 0)
        return result;
    blk->free = slot->next_free;
    blk->in_flight++;
    slot->head = chain.head;
    slot->range = 0;
    slot->done = 0;
    slot->tries = 0;
    slot->req.type = UINT32_MAX;
    fault = av_blk_req_parse(&chain, &blk->limits, &slot->req, &status);
    if (fault != AV_FAULT_NONE) {
        av_vring_fail(blk->ring, fault);
        slot->next_free = blk->free;
        blk->free = slot;
        blk->in_flight--;
        return -EPROTO;
    }
    transferred = status == AV_BLK_S_OK ? av_blk_req_transfers(&slot->req) : 0;
    *bytes += transferred;
    av_throttle_charge(&blk->throttle, 1, transferred);
    if (status != AV_BLK_S_OK)
        av_blk_finish(blk, slot, status);
    else
        av_blk_perform(blk, slot);
    return 1;
}

/* Whether chains may be taken, as far as is known, and there is room for one. */
static bool can_take(const struct av_blk *blk)
{
    return blk->lane.taking && has_room(blk) && !blk->throttle.waiting;
}

/* Submit what is queued and complete what is done. A request may need one operation after the
 * other, thousands of them, so what is still queued after a few is for the next run. */
static void settle(struct av_blk *blk)
{
    for (uint32_t i = 0; i < SETTLE_ROUNDS; i++) {
        if (blk->queued != 0) {
            blk->queued = 0;
            blk->stats.batches++;
            blk->engine->ops->submit(blk->engine);
        }
        blk->engine->ops->reap(blk->engine, av_blk_op_done, blk);
        if (blk->queued == 0)
            break;
    }
}

/* Show the driver what is done, and interrupt it if it wants that. */
static void flush(struct av_blk *blk)
{
    blk->finished = 0;
    blk->hold.count = 0;
    av_vring_flush(blk->ring);
}

/* Take, start and complete requests, a portion after the other; 1 when the ring may hold more. */
static int serve(struct av_blk *blk)
{
    uint32_t taken = 0, portion;
    uint64_t bytes = 0, portion_bytes;
    int result;

    av_vring_kicks_off(blk->ring);
    av_throttle_begin(&blk->throttle);
    do {
        portion = 0;
        portion_bytes = 0;
        while ((result = take(blk, &portion_bytes)) > 0)
            if (++portion == PORTION_REQUESTS || portion_bytes >= PORTION_BYTES)
                break;
        settle(blk);
        taken += portion;
        bytes += portion_bytes;
        /* A driver that sleeps takes longer to wake than we need for the next portions: woken by
         * the end of the run, it would find all done, and we would wait for it. Large transfers are
         * so few that it need not be woken more than once before the end. */
        if (result > 0 && (taken == portion || portion == PORTION_REQUESTS))
            flush(blk);
        else
            av_vring_show(blk->ring);
    } while (result > 0 && taken < blk->config.depth && bytes < RUN_BYTES);
    av_throttle_end(&blk->throttle);
    return result;
}

static struct av_blk *of(struct av_lane *lane)
{
    return (struct av_blk *)lane;
}

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Whether the driver may wait a moment for its interrupt; then the timer is set. */
static bool holds_back(struct av_blk *blk)
{
    uint64_t before_ns = blk->hold.until_ns, until_ns;
    struct itimerspec at = { 0 };
    bool due;

    if (blk->finished == 0)
        return false;
    /* A file that takes its time is to have as many requests as the driver can make. */
    due = can_take(blk) && blk->in_flight == 0 && av_vring_interrupt_due(blk->ring);
    until_ns = av_hold_until(&blk->hold, blk->finished - blk->hold.count, due, now_ns());
    if (until_ns == 0 || until_ns == before_ns)
        return until_ns != 0;
    at.it_value.tv_sec = (time_t)(until_ns / 1000000000u);
    at.it_value.tv_nsec = (long)(until_ns % 1000000000u);
    /* Without a timer to rely on nobody may be made to wait. */
    return timerfd_settime(blk->timer_fd, TFD_TIMER_ABSTIME, &at, NULL) == 0;
}

static int blk_run(struct av_lane *lane, uint32_t ready)
{
    struct av_blk *blk = of(lane);
    int more;

    if (ready & 1u << KICK)
        av_vring_count_kick(blk->ring);
    more = serve(blk);
    if (more == 0 && blk->queued == 0 && holds_back(blk))
        return 0;
    flush(blk);
    /* To be submitted in any case: a fault of the ring is found again by the next run. */
    if (blk->queued != 0)
        return 1;
    if (more < 0)
        return more;
    /* Chains that waited for room may have it by now. */
    return can_take(blk) && (more || av_vring_pending(blk->ring));
}

static bool blk_arm(struct av_lane *lane)
{
    struct av_blk *blk = of(lane);
    bool more = blk->engine->ops->arm(blk->engine);

    /* Without room the next completion goes on with the ring, not a kick. */
    if (can_take(blk) && !av_holds(&blk->hold))
        more |= av_vring_kicks_on(blk->ring) != 0;
    return more;
}

static bool blk_pending(struct av_lane *lane)
{
    struct av_blk *blk = of(lane);

    return (can_take(blk) && !av_holds(&blk->hold) && av_vring_pending(blk->ring)) ||
           blk->engine->ops->ready(blk->engine);
}

static uint64_t blk_taken(const struct av_lane *lane)
{
    return av_vring_taken(((const struct av_blk *)lane)->ring);
}

static bool blk_idle(const struct av_lane *lane)
{
    const struct av_blk *blk = (const struct av_blk *)lane;

    return blk->in_flight == 0 && !av_holds(&blk->hold);
}

static void blk_hold(struct av_lane *lane)
{
    av_throttle_leave(&of(lane)->throttle);
}

static const struct av_lane_ops lane_ops = {
    .run = blk_run,
    .arm = blk_arm,
    .pending = blk_pending,
    .taken = blk_taken,
    .idle = blk_idle,
    .hold = blk_hold,
};

static int allocate(struct av_blk *blk)
{
    uint32_t depth = blk->config.depth;
    /* Not a power of two apart: the few that are in use would share the same sets of the
     * processor's cache. */
    size_t stride = (size_t)(blk->iov_max | 7) + 5;

    blk->slots = calloc(depth, sizeof(*blk->slots));
    blk->iovs = calloc(depth * stride, sizeof(*blk->iovs));
    blk->ranges = calloc((size_t)depth * AV_BLK_RANGES_MAX, sizeof(*blk->ranges));
    if (blk->slots == NULL || blk->iovs == NULL || blk->ranges == NULL)
        return ENOMEM;
    for (uint32_t i = depth; i-- > 0;) {
        struct av_blk_slot *slot = &blk->slots[i];

        slot->iov = blk->iovs + i * stride;
        slot->req.range = blk->ranges + (size_t)i * AV_BLK_RANGES_MAX;
        slot->next_free = blk->free;
        blk->free = slot;
    }
    return 0;
}

static struct av_blk_engine *create_engine(const struct av_blk_config *config, int *error)
{
    switch ((enum av_blk_engine_kind)config->engine) {
    case AV_BLK_IO_URING:
        return av_blk_uring_create(config->fd, config->depth, config->may_hang != 0, error);
    case AV_BLK_THREADS:
        return av_blk_threads_create(config->fd, config->workers, error);
    case AV_BLK_LOOP:
        return av_blk_loop_create(error);
    }
    *error = EINVAL;
    return NULL;
}

static int set_up(struct av_blk *blk, const struct av_blk_config *config, struct av_home *home)
{
    int error = allocate(blk);

    if (error != 0)
        return error;
    blk->engine = create_engine(config, &error);
    if (blk->engine == NULL)
        return error;
    error = -av_lane_init(&blk->lane, home, &lane_ops, 1);
    if (error != 0)
        return error;
    av_lane_add_source(&blk->lane, blk->engine->event_fd, EPOLLIN);
    blk->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    if (blk->timer_fd < 0)
        return errno;
    av_lane_add_source(&blk->lane, blk->timer_fd, EPOLLIN);
    return 0;
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
    blk->timer_fd = -1;
    av_hold_init(&blk->hold);
    av_throttle_init(&blk->throttle);
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
    av_throttle_fini(&blk->throttle);
    if (blk->timer_fd >= 0)
        close(blk->timer_fd);
    if (blk->engine != NULL)
        blk->engine->ops->destroy(blk->engine);
    free(blk->slots);
    free(blk->iovs);
    free(blk->ranges);
    free(blk);
}

int av_blk_abandon(struct av_blk *blk)
{
    av_lane_abandon(&blk->lane);
    return blk->in_flight != 0;
}

void av_blk_leave(struct av_blk *blk)
{
    av_lane_fini(&blk->lane);
    av_throttle_fini(&blk->throttle);
    av_throttle_init(&blk->throttle);
    blk->ring = NULL;
}

/* An av_blk_done: nobody wants to know. */
static void drop(void *context, struct av_blk_op *op)
{
    struct av_blk *blk = context;
    struct av_blk_slot *slot = (struct av_blk_slot *)op;

    free(slot->bounce);
    slot->bounce = NULL;
    blk->in_flight--;
}

void av_blk_wait(struct av_blk *blk)
{
    struct av_blk_engine *engine = blk->engine;
    struct pollfd finished = { .fd = engine->event_fd, .events = POLLIN };
    uint64_t count;

    engine->ops->cancel(engine);
    for (;;) {
        engine->ops->reap(engine, drop, blk);
        if (blk->in_flight == 0)
            return;
        /* Nobody else drains it: poll() would return at once for ever. Empty (EAGAIN): so be it. */
        if (read(engine->event_fd, &count, sizeof(count)) < 0 && errno != EAGAIN)
            abort();
        if (!engine->ops->arm(engine))
            poll(&finished, 1, -1);
    }
}

struct av_lane *av_blk_lane(struct av_blk *blk)
{
    return &blk->lane;
}

int av_blk_pin(struct av_blk *blk, const struct av_gmem *mem)
{
    return blk->engine->ops->pin == NULL ? 0 : blk->engine->ops->pin(blk->engine, mem);
}

void av_blk_unpin(struct av_blk *blk)
{
    if (blk->engine->ops->unpin != NULL)
        blk->engine->ops->unpin(blk->engine);
}

int av_blk_limit(struct av_blk *blk, struct av_limiter *limiter)
{
    int result;

    av_lane_lock(&blk->lane);
    result = av_throttle_attach(&blk->throttle, &blk->lane, limiter);
    av_lane_unlock(&blk->lane);
    return result;
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
    out->throttled = blk->throttle.waits;
    av_lane_unlock(&blk->lane);
}
