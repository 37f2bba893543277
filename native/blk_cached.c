#define _GNU_SOURCE
#include "blk_cached.h"

#include <errno.h>
#include <sys/uio.h>

#define SKIP_MAX 64u
#define AT_ONCE_MAX_BYTES (512u << 10) /* more takes too long for a thread with other work */

void av_blk_cached_init(struct av_blk_cached *cached, int fd, bool use)
{
    *cached = (struct av_blk_cached){ .fd = fd, .reads = use, .writes = use };
}

/* A disk that is far larger than memory misses nearly always: then try less and less often. */
static void count_read(struct av_blk_cached *cached, bool hit)
{
    if (hit) {
        cached->misses = 0;
        return;
    }
    cached->skip = ++cached->misses < SKIP_MAX ? cached->misses - 1 : SKIP_MAX;
}

bool av_blk_cached_try(struct av_blk_cached *cached, struct av_blk_op *op)
{
    bool *worth = op->kind == AV_BLK_OP_READ ? &cached->reads : &cached->writes;
    ssize_t done;

    if (!*worth || op->length > AT_ONCE_MAX_BYTES ||
        (op->kind != AV_BLK_OP_READ && op->kind != AV_BLK_OP_WRITE))
        return false;
    if (op->kind == AV_BLK_OP_READ) {
        if (cached->skip != 0) {
            cached->skip--;
            return false;
        }
        done = preadv2(cached->fd, op->iov, (int)op->iov_count, (off_t)op->offset, RWF_NOWAIT);
        count_read(cached, done > 0);
    } else {
        done = pwritev2(cached->fd, op->iov, (int)op->iov_count, (off_t)op->offset, RWF_NOWAIT);
    }
    /* A file system that cannot write without waiting (ext4) says so each time. */
    if (done < 0 && (errno == EOPNOTSUPP || errno == EINVAL || errno == ENOSYS))
        *worth = false;
    /* The engine finds errors and the end of the file again, and what to do about them is told
     * in one place. */
    if (done <= 0)
        return false;
    op->result = done;
    return true;
}
