#include "blk_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define ZEROES_BYTES 65536u
#define TRIES_MAX 1000u /* of an operation that the host interrupts */

static uint8_t zeroes[ZEROES_BYTES]; /* never written to */

void av_blk_finish(struct av_blk *blk, struct av_blk_slot *slot, uint8_t status)
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
    av_vring_push(blk->ring, slot->head, written);
    blk->finished++;
    slot->next_free = blk->free;
    blk->free = slot;
    blk->in_flight--;
}

/* What to answer for an operation's result; a disk may say that it does not have it. */
static uint8_t status_of(int64_t result)
{
    if (result >= 0)
        return AV_BLK_S_OK;
    return result == -EOPNOTSUPP ? AV_BLK_S_UNSUPP : AV_BLK_S_IOERR;
}

static void start(struct av_blk *blk, struct av_blk_slot *slot, enum av_blk_op_kind kind)
{
    slot->op.kind = kind;
    blk->engine->ops->queue(blk->engine, &slot->op);
    blk->queued++;
}

static bool has_lost(const struct av_blk *blk)
{
    return blk->config.lost != NULL && __atomic_load_n(blk->config.lost, __ATOMIC_ACQUIRE) != 0;
}

static void start_sync(struct av_blk *blk, struct av_blk_slot *slot)
{
    if (has_lost(blk)) {
        av_blk_finish(blk, slot, AV_BLK_S_IOERR);
        return;
    }
    slot->op.length = 0;
    start(blk, slot, AV_BLK_OP_SYNC);
}

/* Whether a sync has ended so that what was to be written is forgotten. ECANCELED: not begun. */
static bool loses(int64_t result)
{
    return result < 0 && result != -EOPNOTSUPP && result != -ECANCELED && result != -EINTR &&
           result != -EAGAIN;
}

static void sync_done(struct av_blk *blk, struct av_blk_slot *slot)
{
    int64_t result = slot->op.result;
    int none = 0;

    if (loses(result) && blk->config.lost != NULL &&
        __atomic_compare_exchange_n(blk->config.lost, &none, (int)-result, false, __ATOMIC_ACQ_REL,
                                    __ATOMIC_ACQUIRE))
        av_lane_news(&blk->lane);
    /* Of several at a time, on several queues, the host tells only one. */
    av_blk_finish(blk, slot, has_lost(blk) ? AV_BLK_S_IOERR : status_of(result));
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
static bool set_bounce(struct av_blk *blk, struct av_blk_slot *slot)
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

static void start_transfer(struct av_blk *blk, struct av_blk_slot *slot)
{
    struct av_blk_req *req = &slot->req;

    slot->op.iov = req->data;
    slot->op.iov_count = req->data_count;
    if (blk->config.alignment_bytes > 1 && !aligned(blk, req)) {
        if (!set_bounce(blk, slot)) {
            av_blk_finish(blk, slot, AV_BLK_S_IOERR);
            return;
        }
        slot->op.iov = &slot->bounce_iov;
        slot->op.iov_count = 1;
    }
    slot->op.offset = req->sector * AV_BLK_SECTOR_BYTES;
    slot->op.length = req->data_bytes;
    start(blk, slot, req->type == AV_BLK_T_IN ? AV_BLK_OP_READ : AV_BLK_OP_WRITE);
}

/* The present range of a discard or write-zeroes, or the end of the request. */
static void start_range(struct av_blk *blk, struct av_blk_slot *slot)
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
            av_blk_finish(blk, slot, AV_BLK_S_OK);
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
static void start_zero_write(struct av_blk *blk, struct av_blk_slot *slot)
{
    const struct av_blk_range *range = &slot->req.range[slot->range];
    uint64_t left = (uint64_t)range->sectors * AV_BLK_SECTOR_BYTES - slot->zeroed;

    slot->zero_iov.iov_base = zeroes;
    slot->zero_iov.iov_len = left < ZEROES_BYTES ? left : ZEROES_BYTES;
    slot->op.iov = &slot->zero_iov;
    slot->op.iov_count = 1;
    slot->op.offset = range->sector * AV_BLK_SECTOR_BYTES + slot->zeroed;
    slot->op.length = slot->zero_iov.iov_len;
    av_throttle_charge(&blk->throttle, 0, slot->op.length);
    start(blk, slot, AV_BLK_OP_WRITE);
}

static void range_done(struct av_blk *blk, struct av_blk_slot *slot)
{
    const struct av_blk_range *range = &slot->req.range[slot->range];
    int64_t result = slot->op.result;

    if (slot->op.kind == AV_BLK_OP_WRITE) {
        if (result <= 0) {
            av_blk_finish(blk, slot, AV_BLK_S_IOERR);
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
        av_blk_finish(blk, slot, AV_BLK_S_IOERR);
        return;
    }
    slot->range++;
    start_range(blk, slot);
}

/* What is left of a transfer that the host did in part. */
static void start_rest(struct av_blk *blk, struct av_blk_slot *slot, uint32_t moved)
{
    struct iovec *iov = (struct iovec *)slot->op.iov;

    slot->op.offset += moved;
    slot->op.length -= moved;
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

static void transfer_done(struct av_blk *blk, struct av_blk_slot *slot)
{
    int64_t result = slot->op.result;

    if (result <= 0) { /* 0: the file ends before the disk does */
        av_blk_finish(blk, slot, result == 0 ? AV_BLK_S_IOERR : status_of(result));
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
    av_blk_finish(blk, slot, AV_BLK_S_OK);
}

void av_blk_op_done(void *context, struct av_blk_op *op)
{
    struct av_blk *blk = context;
    struct av_blk_slot *slot = (struct av_blk_slot *)op;

    if ((op->result == -EINTR || op->result == -EAGAIN) && ++slot->tries < TRIES_MAX) {
        start(blk, slot, op->kind);
        return;
    }
    slot->tries = 0;
    if (op->kind == AV_BLK_OP_SYNC)
        sync_done(blk, slot);
    else if (slot->req.range_count != 0)
        range_done(blk, slot);
    else
        transfer_done(blk, slot);
}

static void answer_id(struct av_blk *blk, struct av_blk_slot *slot)
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
    av_blk_finish(blk, slot, AV_BLK_S_OK);
}

void av_blk_perform(struct av_blk *blk, struct av_blk_slot *slot)
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
