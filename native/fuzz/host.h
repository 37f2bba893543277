/* What stands in for the host: a home for lanes, and the calls that build.py replaces. */
#ifndef AV_FUZZ_HOST_H
#define AV_FUZZ_HOST_H

#include <stdint.h>
#include <sys/types.h>
#include <time.h>

#include "home.h"

/* One for all inputs; without a thread. */
struct av_home *fuzz_home(void);
/* The clock that the code under test reads, all of its life at one moment. */
extern uint64_t fuzz_now_ns;
int fuzz_clock_gettime(clockid_t clock, struct timespec *now);
/* Always the same bytes. */
ssize_t fuzz_getrandom(void *to, size_t bytes, unsigned flags);

#endif
