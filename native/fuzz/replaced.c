#include "host.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "fuzz.h"

#define NS_PER_S 1000000000

uint64_t fuzz_now_ns;

time_t fuzz_time(time_t *now)
{
    time_t seconds = (time_t)(fuzz_now_ns / NS_PER_S);

    if (now != NULL)
        *now = seconds;
    return seconds;
}

int fuzz_clock_gettime(clockid_t clock, struct timespec *now)
{
    (void)clock;
    now->tv_sec = (time_t)(fuzz_now_ns / NS_PER_S);
    now->tv_nsec = (long)(fuzz_now_ns % NS_PER_S);
    return 0;
}

int fuzz_clock_settime(clockid_t clock, const struct timespec *time)
{
    (void)clock;
    errno = EINVAL;
    return time->tv_sec < 0 || time->tv_nsec < 0 || time->tv_nsec >= NS_PER_S ? -1 : 0;
}

ssize_t fuzz_getrandom(void *to, size_t bytes, unsigned flags)
{
    (void)flags;
    memset(to, 0x5a, bytes);
    return (ssize_t)bytes;
}

void *fuzz_mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset)
{
    void *memory = calloc(1, bytes);

    CHECK(at == NULL && (flags & MAP_ANONYMOUS) && protection == (PROT_READ | PROT_WRITE));
    CHECK(fd == -1 && offset == 0);
    return memory == NULL ? MAP_FAILED : memory;
}

int fuzz_munmap(void *at, size_t bytes)
{
    (void)bytes;
    free(at);
    return 0;
}
