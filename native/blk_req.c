#include "blk_req.h"

#include <stdbool.h>
#include <string.h>

struct header {
    uint32_t type;
    uint32_t reserved;
    uint64_t sector;
};
_Static_assert(sizeof(struct header) == 16, "struct virtio_blk_req");

/* Copy up to `size` bytes off the front of the segments, and shorten them by it; how many. */
static uint32_t take_front(struct iovec **iov, uint32_t *count, void *to, uint32_t size)
{
    uint32_t done = 0;

    while (done < size && *count != 0) {
        uint32_t left = size - done;
        uint32_t piece = (*iov)->iov_len < left ? (uint32_t)(*iov)->iov_len : left;

        memcpy((uint8_t *)to + done, (*iov)->iov_base, piece);
        done += piece;
        (*iov)->iov_base = (uint8_t *)(*iov)->iov_base + piece;
        (*iov)->iov_len -= piece;
        if ((*iov)->iov_len == 0) {
            (*iov)++;
            (*count)--;
        }
    }
    return done;
}

static bool in_capacity(const struct av_blk_limits *limits, uint64_t sector, uint64_t sectors)
{
    return sectors <= limits->capacity_sectors && sector <= limits->capacity_sectors - sectors;
}

static uint8_t check_transfer(const struct av_blk_limits *limits, const struct av_blk_req *req)
{
    if (req->data_bytes == 0 || req->data_bytes % AV_BLK_SECTOR_BYTES != 0)
        return AV_BLK_S_IOERR;
    if (req->type == AV_BLK_T_OUT && limits->read_only)
        return AV_BLK_S_IOERR;
    if (!in_capacity(limits, req->sector, req->data_bytes / AV_BLK_SECTOR_BYTES))
        return AV_BLK_S_IOERR;
    return AV_BLK_S_OK;
}

/* Sections 5.2.6.1 and 5.2.6.2: which flags make it unsupported, wherever they are, and which
 * ranges an error. */
static uint8_t take_ranges(const struct av_blk_limits *limits, struct av_blk_req *req)
{
    uint32_t allowed = req->type == AV_BLK_T_WRITE_ZEROES ? AV_BLK_RANGE_UNMAP : 0;
    uint32_t bytes = req->data_bytes;

    if (!(req->type == AV_BLK_T_DISCARD ? limits->discard : limits->write_zeroes))
        return AV_BLK_S_UNSUPP;
    if (limits->read_only || bytes == 0 || bytes % sizeof(req->range[0]) != 0 ||
        bytes > AV_BLK_RANGES_MAX * sizeof(req->range[0]))
        return AV_BLK_S_IOERR;
    req->range_count = bytes / (uint32_t)sizeof(req->range[0]);
    take_front(&req->data, &req->data_count, req->range, bytes);
    for (uint32_t i = 0; i < req->range_count; i++)
        if (req->range[i].flags & ~allowed)
            return AV_BLK_S_UNSUPP;
    for (uint32_t i = 0; i < req->range_count; i++)
        if (!in_capacity(limits, req->range[i].sector, req->range[i].sectors))
            return AV_BLK_S_IOERR;
    return AV_BLK_S_OK;
}

static uint8_t check(const struct av_blk_limits *limits, struct av_blk_req *req)
{
    switch (req->type) {
    case AV_BLK_T_IN:
    case AV_BLK_T_OUT:
        return check_transfer(limits, req);
    case AV_BLK_T_FLUSH:
    case AV_BLK_T_GET_ID:
        return AV_BLK_S_OK;
    case AV_BLK_T_DISCARD:
    case AV_BLK_T_WRITE_ZEROES:
        return take_ranges(limits, req);
    default:
        return AV_BLK_S_UNSUPP;
    }
}

int av_blk_req_parse(struct av_chain *chain, const struct av_blk_limits *limits,
                     struct av_blk_req *out, uint8_t *status)
{
    struct iovec *readable = chain->iov, *writable = chain->iov + chain->readable;
    uint32_t readable_count = chain->readable, writable_count = chain->writable;
    struct iovec *last;
    struct header header;

    if (chain->writable_bytes == 0)
        return AV_FAULT_REQUEST;
    /* No assumption about framing (2.7.4): the status is the last writable byte, wherever. */
    last = &writable[writable_count - 1];
    out->status = (uint8_t *)last->iov_base + last->iov_len - 1;
    if (--last->iov_len == 0)
        writable_count--;
    out->data_bytes = 0;
    out->range_count = 0;
    if (take_front(&readable, &readable_count, &header, sizeof(header)) != sizeof(header)) {
        *status = AV_BLK_S_IOERR;
        return 0;
    }
    out->type = header.type;
    out->sector = header.sector;
    if (header.type == AV_BLK_T_IN || header.type == AV_BLK_T_GET_ID) {
        out->data = writable;
        out->data_count = writable_count;
        out->data_bytes = chain->writable_bytes - 1;
    } else {
        out->data = readable;
        out->data_count = readable_count;
        out->data_bytes = chain->readable_bytes - (uint32_t)sizeof(header);
    }
    *status = check(limits, out);
    return 0;
}
