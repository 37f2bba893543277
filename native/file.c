#define _GNU_SOURCE
#include "file.h"

#include <errno.h>
#include <fcntl.h>

int av_file_punch(int fd, uint64_t offset, uint64_t size_bytes)
{
    int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;

    return fallocate(fd, mode, (off_t)offset, (off_t)size_bytes) < 0 ? -errno : 0;
}
