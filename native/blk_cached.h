/* Transfers that the page cache can do at once: cheaper than any engine, and they never wait. */
#ifndef AV_BLK_CACHED_H
#define AV_BLK_CACHED_H

#include <stdbool.h>
#include <stdint.h>

#include "blk_engine.h"

struct av_blk_cached {
    int fd;
    bool reads;  /* worth trying */
    bool writes;
    uint32_t misses; /* in a row */
    uint32_t skip;   /* reads not to try, since the last ones missed */
};

/* use: whether the descriptor goes through the page cache at all. */
void av_blk_cached_init(struct av_blk_cached *cached, int fd, bool use);
/* True when the operation is over, its result in it; false when an engine has to do it. */
bool av_blk_cached_try(struct av_blk_cached *cached, struct av_blk_op *op);

#endif
