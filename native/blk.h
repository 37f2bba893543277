/* The block device's datapath: a ring on one side, an engine on the other. A device has one of
 * these a queue, so queues share nothing and need no lock. */
#ifndef AV_BLK_H
#define AV_BLK_H

#include <stdint.h>

#include "home.h"
#include "throttle.h"
#include "vring.h"

#define AV_BLK_WORKERS_MAX 4
/* How much of one request is copied at a time: what is longer is done in pieces. */
#define AV_BLK_COPY_BYTES (4u << 20)

/* cdef begin */
enum av_blk_engine_kind { AV_BLK_IO_URING, AV_BLK_THREADS, AV_BLK_LOOP };

enum av_blk_op_kind {
    AV_BLK_OP_READ,
    AV_BLK_OP_WRITE,
    AV_BLK_OP_SYNC,  /* fdatasync */
    AV_BLK_OP_PUNCH, /* deallocate; reads as zeroes */
    AV_BLK_OP_ZERO   /* zero without deallocating */
};

/* fd is borrowed; -1 for AV_BLK_LOOP. alignment_bytes: what direct I/O needs of memory, offset and length; else 1.
 * depth: requests in flight at most, a power of two. seg_max: data segments of a request.
 * copies: data is copied on its way, by the disk itself if not for its alignment. copy_max_bytes:
 * as long as so much is under way, no request is taken.
 * lost: shared by the queues of a disk behind a page cache, borrowed; NULL: it is not. The errno of
 * a sync that failed, 0 before: what was not written is forgotten then, a later sync says that all
 * is well, so from there on none is acknowledged. Its lane has news when it is set. */
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
    uint32_t workers; /* threads of AV_BLK_THREADS, 1 to AV_BLK_WORKERS_MAX */
    uint32_t alignment_bytes;
    uint8_t copies;
    uint64_t copy_max_bytes;
    uint8_t may_hang; /* av_file_may_hang() */
    int *lost;
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
    uint64_t throttled; /* times that requests had to wait for the limiter */
};

struct av_blk;
/* home and ring are borrowed. NULL: *error is the errno. */
struct av_blk *av_blk_create(const struct av_blk_config *config, struct av_home *home,
                             struct av_vring *ring, int *error);
void av_blk_destroy(struct av_blk *blk); /* its lane is at rest */
struct av_lane *av_blk_lane(struct av_blk *blk); /* kick 0: the ring's */
/* For a disk whose storage does not answer, not of AV_BLK_LOOP: its lane is at rest, and whatever
 * is in flight is answered to nobody. 1: then something is, and until av_blk_wait() returns the
 * engine may still use the guest's memory. */
int av_blk_abandon(struct av_blk *blk);
/* Let go of home, ring and limiter; only what follows may be called then. Abandoned. */
void av_blk_leave(struct av_blk *blk);
/* Wait until nothing is in flight, if for ever; on any one thread. av_blk_destroy() comes next. */
void av_blk_wait(struct av_blk *blk);
/* Keep memory in place, for less work a transfer; its lane at rest, as for av_blk_unpin(), which
 * comes before the memory goes. 0 or -errno. Nothing when it is pinned, or has no io_uring. */
int av_blk_pin(struct av_blk *blk, const struct av_gmem *mem);
void av_blk_unpin(struct av_blk *blk);
/* Obey it from now on; borrowed. Nothing when it does already. 0 or -errno. Requests count with
 * the bytes that they read or write, those written as zeroes among them; with none if they fail
 * their checks. */
int av_blk_limit(struct av_blk *blk, struct av_limiter *limiter);
void av_blk_set_writeback(struct av_blk *blk, int writeback);
void av_blk_set_capacity(struct av_blk *blk, uint64_t sectors);
void av_blk_statistics(struct av_blk *blk, struct av_blk_stats *out);
/* cdef end */

#endif
