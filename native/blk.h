/* The block device's datapath: rings on one side, an engine on the other. */
#ifndef AV_BLK_H
#define AV_BLK_H

#include <stdint.h>

#include "vring.h"

#define AV_BLK_QUEUES_MAX 64

/* cdef begin */
enum av_blk_engine_kind { AV_BLK_IO_URING, AV_BLK_THREADS };

/* fd is borrowed. alignment_bytes: what direct I/O needs of memory, offset and length; else 1.
 * depth: requests in flight at most, a power of two. seg_max: data segments of a request. */
struct av_blk_config {
    int fd;
    uint64_t capacity_sectors;
    uint8_t read_only;
    uint8_t discard;
    uint8_t write_zeroes;
    uint8_t writeback;
    uint32_t seg_max;
    uint32_t depth;
    uint32_t engine;
    uint32_t alignment_bytes;
    char id[20]; /* padded with zeroes */
};

struct av_blk_stats {
    uint64_t reads;
    uint64_t writes;
    uint64_t flushes;
    uint64_t discards;
    uint64_t write_zeroes;
    uint64_t get_ids;
    uint64_t unsupported;
    uint64_t errors;
    uint64_t read_bytes;
    uint64_t write_bytes;
    uint64_t batches; /* submissions to the engine */
    uint64_t bounced; /* requests whose memory was not aligned for direct I/O */
};

/* One thread uses a device. */
struct av_blk;
struct av_blk *av_blk_create(const struct av_blk_config *config, int *error); /* NULL: errno */
void av_blk_destroy(struct av_blk *blk); /* nothing may be in flight */
/* Readable when av_blk_complete() has something to do. */
int av_blk_event_fd(const struct av_blk *blk);
/* Add a ring, borrowed; its queue number from 0 on, or -ENOSPC. */
int av_blk_attach(struct av_blk *blk, struct av_vring *ring);
/* Take what a queue offers, start its I/O in one batch, and complete what is done by then.
 * Drains kick_fd. 1 when there may be more to do, 0 when not, -EPROTO or -errno. */
int av_blk_kick(struct av_blk *blk, uint32_t queue, int kick_fd);
/* Complete what the engine has finished; then go on with queues that waited for a free place.
 * As av_blk_kick(). */
int av_blk_complete(struct av_blk *blk);
/* Held: no further chains are taken. What is in flight goes on. */
void av_blk_hold(struct av_blk *blk, int held);
uint32_t av_blk_in_flight(const struct av_blk *blk);
void av_blk_set_writeback(struct av_blk *blk, int writeback);
void av_blk_set_capacity(struct av_blk *blk, uint64_t sectors);
void av_blk_statistics(const struct av_blk *blk, struct av_blk_stats *out);
/* cdef end */

#endif
