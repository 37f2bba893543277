#include "host.h"

#include <string.h>

#include "fuzz.h"

#define NS_PER_S 1000000000u

uint64_t fuzz_now_ns;

struct av_home *fuzz_home(void)
{
    static struct av_home *home;
    int error;

    if (home == NULL)
        home = av_home_create(&error);
    CHECK(home != NULL);
    return home;
}

int fuzz_clock_gettime(clockid_t clock, struct timespec *now)
{
    (void)clock;
    now->tv_sec = (time_t)(fuzz_now_ns / NS_PER_S);
    now->tv_nsec = (long)(fuzz_now_ns % NS_PER_S);
    return 0;
}

ssize_t fuzz_getrandom(void *to, size_t bytes, unsigned flags)
{
    (void)flags;
    memset(to, 0x5a, bytes);
    return (ssize_t)bytes;
}
