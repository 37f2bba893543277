/* Parsing of block requests (virtio 1.3 section 5.2.6). Knows no files. */
#ifndef AV_BLK_REQ_H
#define AV_BLK_REQ_H

#include <stdint.h>

#include "vring.h"

#define AV_BLK_T_IN 0u
#define AV_BLK_T_OUT 1u
#define AV_BLK_T_FLUSH 4u
#define AV_BLK_T_GET_ID 8u
#define AV_BLK_T_DISCARD 11u
#define AV_BLK_T_WRITE_ZEROES 13u

#define AV_BLK_S_OK 0
#define AV_BLK_S_IOERR 1
#define AV_BLK_S_UNSUPP 2

#define AV_BLK_SECTOR_BYTES 512u
#define AV_BLK_ID_BYTES 20u
#define AV_BLK_RANGES_MAX 32u
#define AV_BLK_RANGE_UNMAP 1u

/* A segment of a discard or write-zeroes request, as the driver wrote it. */
struct av_blk_range {
    uint64_t sector;
    uint32_t sectors;
    uint32_t flags;
};
_Static_assert(sizeof(struct av_blk_range) == 16, "struct virtio_blk_discard_write_zeroes");

/* What the device allows. */
struct av_blk_limits {
    uint64_t capacity_sectors;
    uint8_t read_only;
    uint8_t discard;
    uint8_t write_zeroes;
};

/* A request, copied out of guest memory but for its data. */
struct av_blk_req {
    uint32_t type;
    uint64_t sector;
    uint8_t *status;      /* in guest memory */
    struct iovec *data;   /* in guest memory; inside the chain's iov */
    uint32_t data_count;
    uint32_t data_bytes;
    uint32_t range_count;
    struct av_blk_range *range; /* room for AV_BLK_RANGES_MAX, the caller's */
};

/* Take a chain apart, changing its iov; out->range is set. 0, or AV_FAULT_REQUEST when it has no room for a status.
 * *status is what to answer at once, or AV_BLK_S_OK when the request is to be performed. */
int av_blk_req_parse(struct av_chain *chain, const struct av_blk_limits *limits,
                     struct av_blk_req *out, uint8_t *status);

/* Bytes that performing it moves between guest and disk. */
static inline uint32_t av_blk_req_transfers(const struct av_blk_req *req)
{
    return req->type == AV_BLK_T_IN || req->type == AV_BLK_T_OUT ? req->data_bytes : 0;
}

#endif
