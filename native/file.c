#define _GNU_SOURCE
#include "file.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/statfs.h>

int av_file_punch(int fd, uint64_t offset, uint64_t size_bytes)
{
    int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;

    return fallocate(fd, mode, (off_t)offset, (off_t)size_bytes) < 0 ? -errno : 0;
}

/* FUSE lets the kernel believe that it can read without waiting, and then waits for its server: a
 * server that hangs would have the thread that submits, and all that is done there. */
int av_file_may_hang(int fd)
{
    struct statfs status;

    return fstatfs(fd, &status) < 0 || status.f_type == FUSE_SUPER_MAGIC;
}
