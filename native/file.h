/* What Python's own os module has no call for. */
#ifndef AV_FILE_H
#define AV_FILE_H

#include <stdint.h>

/* cdef begin */
/* Deallocate a range, which reads as zeroes then; the size stays. 0 or -errno. Any thread. */
int av_file_punch(int fd, uint64_t offset, uint64_t size_bytes);
/* Whether an io_uring operation on it may wait for its storage while it is submitted. Any thread. */
int av_file_may_hang(int fd);
/* cdef end */

#endif
