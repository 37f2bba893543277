#include "blk_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define ZEROES_BYTES 65536u
#define ZEROES_ALIGNMENT 4096u /* what every file with direct I/O is content with */
#define TRIES_MAX 1000u /* of an operation that the host interrupts */

static _Alignas(ZEROES_ALIGNMENT) uint8_t zeroes[ZEROES_BYTES]; /* never written to */

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
    blk->copied_bytes -= slot->copied_bytes;
    slot->copied_bytes = 0;
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

/* Between the first `bytes` of what is left of the guest's data and a buffer. */
static void copy_data(const struct av_blk_req *req, uint8_t *buffer, uint32_t bytes, bool to_guest)
{
    for (const struct iovec *iov = req->data; bytes != 0; iov++) {
        uint32_t piece = iov->iov_len < bytes ? (uint32_t)iov->iov_len : bytes;

        if (to_guest)
            memcpy(iov->iov_base, buffer, piece);
        else
            memcpy(buffer, iov->iov_base, piece);
        buffer += piece;
        bytes -= piece;
    }
}

/* The first `bytes` of what is left have been moved. */
static void advance(struct av_blk_req *req, uint32_t bytes)
{
    while (req->data_count != 0 && bytes >= req->data->iov_len) {
        bytes -= (uint32_t)req->data->iov_len;
        req->data++;
        req->data_count--;
    }
    if (req->data_count != 0) {
        req->data->iov_base = (uint8_t *)req->data->iov_base + bytes;
        req->data->iov_len -= bytes;
    }
}

/* Let the operation have the first `bytes` of what is left of the guest's data. */
static void give_piece(struct av_blk_slot *slot, uint32_t bytes)
{
    struct iovec *iov = slot->req.data;

    slot->op.iov = iov;
    while (bytes > iov->iov_len) {
        bytes -= (uint32_t)iov->iov_len;
        iov++;
    }
    slot->cut_bytes = (uint32_t)iov->iov_len - bytes;
    slot->op.iov_count = (uint32_t)(iov - slot->op.iov) + 1;
    iov->iov_len = bytes;
}

/* Take it back. */
static void take_piece(struct av_blk_slot *slot)
{
    if (slot->bounce == NULL)
        slot->req.data[slot->op.iov_count - 1].iov_len += slot->cut_bytes;
}

/* What is left of a transfer, or as much of it as may be copied at a time. */
static void start_piece(struct av_blk *blk, struct av_blk_slot *slot)
{
    struct av_blk_req *req = &slot->req;
    uint32_t bytes = req->data_bytes - slot->done;
    bool is_read = req->type == AV_BLK_T_IN;

    if (slot->copied_bytes != 0 && bytes > slot->copied_bytes)
        bytes = slot->copied_bytes;
    if (slot->bounce != NULL) {
        if (!is_read)
            copy_data(req, slot->bounce, bytes, false);
        slot->bounce_iov = (struct iovec){ .iov_base = slot->bounce, .iov_len = bytes };
        slot->op.iov = &slot->bounce_iov;
        slot->op.iov_count = 1;
    } else {
        give_piece(slot, bytes);
    }
    slot->op.offset = req->sector * AV_BLK_SECTOR_BYTES + slot->done;
    slot->op.length = bytes;
    start(blk, slot, is_read ? AV_BLK_OP_READ : AV_BLK_OP_WRITE);
}

static void start_transfer(struct av_blk *blk, struct av_blk_slot *slot)
{
    uint32_t alignment_bytes = blk->config.alignment_bytes;
    bool bounces = alignment_bytes > 1 && !aligned(blk, &slot->req);

    if (bounces || blk->config.copies) {
        /* All descriptors of a chain may name the same memory, and all chains of a queue too. */
        slot->copied_bytes = slot->req.data_bytes;
        if (slot->copied_bytes > AV_BLK_COPY_BYTES)
            slot->copied_bytes = AV_BLK_COPY_BYTES;
        blk->copied_bytes += slot->copied_bytes;
    }
    /* Direct I/O wants aligned memory, and guests may offer any: go through a buffer of our own. */
    if (bounces) {
        if (posix_memalign((void **)&slot->bounce, alignment_bytes, slot->copied_bytes) != 0) {
            slot->bounce = NULL;
            av_blk_finish(blk, slot, AV_BLK_S_IOERR);
            return;
        }
        blk->stats.bounced++;
    }
    start_piece(blk, slot);
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

static void transfer_done(struct av_blk *blk, struct av_blk_slot *slot)
{
    int64_t result = slot->op.result;

    take_piece(slot);
    if (result <= 0) { /* 0: the file ends before the disk does */
        av_blk_finish(blk, slot, result == 0 ? AV_BLK_S_IOERR : status_of(result));
        return;
    }
    if (slot->bounce != NULL && slot->req.type == AV_BLK_T_IN)
        copy_data(&slot->req, slot->bounce, (uint32_t)result, true);
    slot->done += (uint32_t)result;
    if (slot->done < slot->req.data_bytes) {
        advance(&slot->req, (uint32_t)result);
        start_piece(blk, slot);
        return;
    }
    if (slot->req.type == AV_BLK_T_IN) {
        blk->stats.read_bytes += slot->done;
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
