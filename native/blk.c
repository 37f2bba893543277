#define _GNU_SOURCE
#include "blk.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "blk_engine.h"
#include "blk_req.h"

#define ZEROES_BYTES 65536u

/* A request in flight. */
struct slot {
    struct av_blk_op op; /* first: the engine gives it back */
    struct av_blk_req req;
    struct av_vring *ring;
    uint16_t head;
    uint32_t range;     /* of a discard or write-zeroes: which one is under way */
    uint64_t zeroed;    /* bytes of it that were written as zeroes */
    uint32_t done;      /* bytes of data moved */
    uint8_t *bounce;
    struct iovec bounce_iov;
    struct iovec zero_iov;
    struct slot *next_free;
    struct iovec *iov;
};

struct queue {
    struct av_vring *ring;
    bool starved; /* it may hold chains for which there was no free slot */
};

struct av_blk {
    struct av_blk_config config;
    struct av_blk_limits limits;
    struct av_blk_engine *engine;
    uint32_t iov_max;
    uint32_t in_flight;
    uint32_t queued; /* operations handed to the engine since its last submit */
    bool held;
    struct slot *slots;
    struct slot *free;
    struct iovec *iovs;
    uint32_t queue_count;
    struct queue queue[AV_BLK_QUEUES_MAX];
    struct av_blk_stats stats;
};

static uint8_t zeroes[ZEROES_BYTES]; /* never written to */

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

static void finish(struct av_blk *blk, struct slot *slot, uint8_t status)
{
    uint32_t written = 1;

    if (status == AV_BLK_S_IOERR)
        blk->stats.errors++;
    else if (status == AV_BLK_S_UNSUPP)
        blk->stats.unsupported++;
    else if (slot->req.type == AV_BLK_T_IN || slot->req.type == AV_BLK_T_GET_ID)
        written += slot->done;
    if (slot->bounce != NULL) {
        free(slot->bounce);
        slot->bounce = NULL;
    }
    *slot->req.status = status;
    av_vring_push(slot->ring, slot->head, written);
    slot->next_free = blk->free;
    blk->free = slot;
    blk->in_flight--;
}

static void start(struct av_blk *blk, struct slot *slot, enum av_blk_op_kind kind)
{
    slot->op.kind = kind;
    blk->engine->ops->queue(blk->engine, &slot->op);
    blk->queued++;
}

static void start_sync(struct av_blk *blk, struct slot *slot)
{
    start(blk, slot, AV_BLK_OP_SYNC);
}

static bool aligned(const struct av_blk *blk, const struct av_blk_req *req)
{
    uintptr_t bits = 0;

    for (uint32_t i = 0; i < req->data_count; i++)
        bits |= (uintptr_t)req->data[i].iov_base | req->data[i].iov_len;
    return bits % blk->config.alignment_bytes == 0;
}

static void copy_iov(const struct av_blk_req *req, uint8_t *bounce, bool to_guest)
{
    for (uint32_t i = 0; i < req->data_count; i++) {
        if (to_guest)
            memcpy(req->data[i].iov_base, bounce, req->data[i].iov_len);
        else
            memcpy(bounce, req->data[i].iov_base, req->data[i].iov_len);
        bounce += req->data[i].iov_len;
    }
}

/* Direct I/O wants aligned memory, and guests may offer any: go through a buffer of our own. */
static bool set_bounce(struct av_blk *blk, struct slot *slot)
{
    struct av_blk_req *req = &slot->req;

    if (posix_memalign((void **)&slot->bounce, blk->config.alignment_bytes, req->data_bytes) != 0) {
        slot->bounce = NULL;
        return false;
    }
    blk->stats.bounced++;
    if (req->type == AV_BLK_T_OUT)
        copy_iov(req, slot->bounce, false);
    slot->bounce_iov = (struct iovec){ .iov_base = slot->bounce, .iov_len = req->data_bytes };
    return true;
}

static void start_transfer(struct av_blk *blk, struct slot *slot)
{
    struct av_blk_req *req = &slot->req;

    slot->op.iov = req->data;
    slot->op.iov_count = req->data_count;
    if (blk->config.alignment_bytes > 1 && !aligned(blk, req)) {
        if (!set_bounce(blk, slot)) {
            finish(blk, slot, AV_BLK_S_IOERR);
            return;
        }
        slot->op.iov = &slot->bounce_iov;
        slot->op.iov_count = 1;
    }
    slot->op.offset = req->sector * AV_BLK_SECTOR_BYTES;
    start(blk, slot, req->type == AV_BLK_T_IN ? AV_BLK_OP_READ : AV_BLK_OP_WRITE);
}

/* The present range of a discard or write-zeroes, or the end of the request. */
static void start_range(struct av_blk *blk, struct slot *slot)
{
    const struct av_blk_range *range;
    bool unmap;

    while (slot->range < slot->req.range_count && slot->req.range[slot->range].sectors == 0)
        slot->range++;
    if (slot->range == slot->req.range_count) {
        /* Without a write-back cache, what is done has to be durable. */
        if (!blk->config.writeback)
            start_sync(blk, slot);
        else
            finish(blk, slot, AV_BLK_S_OK);
        return;
    }
    range = &slot->req.range[slot->range];
    unmap = slot->req.type == AV_BLK_T_DISCARD || (range->flags & AV_BLK_RANGE_UNMAP) != 0;
    slot->zeroed = 0;
    slot->op.offset = range->sector * AV_BLK_SECTOR_BYTES;
    slot->op.length = (uint64_t)range->sectors * AV_BLK_SECTOR_BYTES;
    start(blk, slot, unmap ? AV_BLK_OP_PUNCH : AV_BLK_OP_ZERO);
}

/* The host cannot zero by fallocate: write zeroes, a piece at a time. */
static void start_zero_write(struct av_blk *blk, struct slot *slot)
{
    const struct av_blk_range *range = &slot->req.range[slot->range];
    uint64_t left = (uint64_t)range->sectors * AV_BLK_SECTOR_BYTES - slot->zeroed;

    slot->zero_iov.iov_base = zeroes;
    slot->zero_iov.iov_len = left < ZEROES_BYTES ? left : ZEROES_BYTES;
    slot->op.iov = &slot->zero_iov;
    slot->op.iov_count = 1;
    slot->op.offset = range->sector * AV_BLK_SECTOR_BYTES + slot->zeroed;
    start(blk, slot, AV_BLK_OP_WRITE);
}

static void range_done(struct av_blk *blk, struct slot *slot)
{
    const struct av_blk_range *range = &slot->req.range[slot->range];
    int64_t result = slot->op.result;

    if (slot->op.kind == AV_BLK_OP_WRITE) {
        if (result <= 0) {
            finish(blk, slot, AV_BLK_S_IOERR);
            return;
        }
        slot->zeroed += (uint64_t)result;
        if (slot->zeroed < (uint64_t)range->sectors * AV_BLK_SECTOR_BYTES) {
            start_zero_write(blk, slot);
            return;
        }
    } else if (result == -EOPNOTSUPP) {
        /* Discard is a hint (5.2.6.2), and a host that cannot take it has lost nothing. */
        if (slot->req.type == AV_BLK_T_WRITE_ZEROES) {
            start_zero_write(blk, slot);
            return;
        }
    } else if (result < 0) {
        finish(blk, slot, AV_BLK_S_IOERR);
        return;
    }
    slot->range++;
    start_range(blk, slot);
}

/* What is left of a transfer that the host did in part. */
static void start_rest(struct av_blk *blk, struct slot *slot, uint32_t moved)
{
    struct iovec *iov = (struct iovec *)slot->op.iov;

    slot->op.offset += moved;
    while (moved >= iov->iov_len) {
        moved -= (uint32_t)iov->iov_len;
        iov++;
        slot->op.iov_count--;
    }
    iov->iov_base = (uint8_t *)iov->iov_base + moved;
    iov->iov_len -= moved;
    slot->op.iov = iov;
    start(blk, slot, slot->op.kind);
}

static void transfer_done(struct av_blk *blk, struct slot *slot)
{
    int64_t result = slot->op.result;

    if (result <= 0) { /* 0: the file ends before the disk does */
        finish(blk, slot, AV_BLK_S_IOERR);
        return;
    }
    slot->done += (uint32_t)result;
    if (slot->done < slot->req.data_bytes) {
        start_rest(blk, slot, (uint32_t)result);
        return;
    }
    if (slot->req.type == AV_BLK_T_IN) {
        blk->stats.read_bytes += slot->done;
        if (slot->bounce != NULL)
            copy_iov(&slot->req, slot->bounce, true);
    } else {
        blk->stats.write_bytes += slot->done;
        if (!blk->config.writeback) {
            start_sync(blk, slot);
            return;
        }
    }
    finish(blk, slot, AV_BLK_S_OK);
}

static void op_done(void *context, struct av_blk_op *op)
{
    struct av_blk *blk = context;
    struct slot *slot = (struct slot *)op;

    if (op->result == -EINTR || op->result == -EAGAIN)
        start(blk, slot, op->kind);
    else if (op->kind == AV_BLK_OP_SYNC)
        finish(blk, slot, op->result < 0 ? AV_BLK_S_IOERR : AV_BLK_S_OK);
    else if (slot->req.range_count != 0)
        range_done(blk, slot);
    else
        transfer_done(blk, slot);
}

static void answer_id(struct av_blk *blk, struct slot *slot)
{
    const char *id = blk->config.id;
    uint32_t left = AV_BLK_ID_BYTES;

    for (uint32_t i = 0; i < slot->req.data_count && left != 0; i++) {
        uint32_t piece = (uint32_t)slot->req.data[i].iov_len;
        if (piece > left)
            piece = left;
        memcpy(slot->req.data[i].iov_base, id, piece);
        id += piece;
        left -= piece;
    }
    slot->done = AV_BLK_ID_BYTES - left;
    finish(blk, slot, AV_BLK_S_OK);
}

static void perform(struct av_blk *blk, struct slot *slot)
{
    switch (slot->req.type) {
    case AV_BLK_T_IN:
        blk->stats.reads++;
        start_transfer(blk, slot);
        break;
    case AV_BLK_T_OUT:
        blk->stats.writes++;
        start_transfer(blk, slot);
        break;
    case AV_BLK_T_FLUSH:
        blk->stats.flushes++;
        start_sync(blk, slot);
        break;
    case AV_BLK_T_GET_ID:
        blk->stats.get_ids++;
        answer_id(blk, slot);
        break;
    case AV_BLK_T_DISCARD:
        blk->stats.discards++;
        start_range(blk, slot);
        break;
    default:
        blk->stats.write_zeroes++;
        start_range(blk, slot);
    }
}

/* Take one chain; 1 taken, 0 none or no free slot, -EPROTO. */
static int take(struct av_blk *blk, struct av_vring *ring)
{
    struct slot *slot = blk->free;
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
        finish(blk, slot, status);
    else
        perform(blk, slot);
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
        blk->engine->ops->reap(blk->engine, op_done, blk);
    } while (blk->queued != 0);
    return 0;
}

/* Take and start up to a device's depth of requests; 1 when the ring may hold more. */
static int serve(struct av_blk *blk, struct queue *queue)
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
