/* The engine whose operations the event loop performs: a disk written in Python.
 *
 * What the datapath submits waits here until the loop takes it, right after the turn of its home
 * that submitted it; so the disk's lane is on the loop's home. Results come in any order. */
#ifndef AV_BLK_LOOP_H
#define AV_BLK_LOOP_H

#include <stdint.h>

#include "blk.h"

/* cdef begin */
/* op: names it until it is finished. base: of its only segment; 0 when iov_count is not 1. */
struct av_blk_loop_op {
    uint64_t op;
    uint64_t offset;
    uint64_t length;
    uint64_t base;
    uint32_t kind;
    uint32_t iov_count;
};

/* Take up to `max` operations of a device made with AV_BLK_LOOP; how many. */
int av_blk_loop_take(struct av_blk *blk, struct av_blk_loop_op *out, int max);
/* Its segments, iov_count of them: guest memory, of a write sometimes ours, which is read-only. */
const struct iovec *av_blk_loop_segments(uint64_t op);
/* Copy `bytes`, as many as its length, into the segments of a read, or out of those of a write. */
void av_blk_loop_scatter(uint64_t op, const uint8_t *from, uint64_t bytes);
void av_blk_loop_gather(uint64_t op, uint8_t *to, uint64_t bytes);
/* Its result: bytes moved, 0 or -errno. Neither -EINTR nor -EAGAIN, which mean: once more. */
void av_blk_loop_finish(struct av_blk *blk, uint64_t op, int64_t result);
/* cdef end */

#endif
