/* What stands in for the host: a home for lanes, and the calls that build.py replaces. */
#ifndef AV_FUZZ_HOST_H
#define AV_FUZZ_HOST_H

#include <stdint.h>
#include <sys/types.h>
#include <time.h>

struct av_home;
struct sockaddr;

/* One for all inputs; without a thread. */
struct av_home *fuzz_home(void);
/* The time by every clock, which an input moves. Setting a clock does nothing. */
extern uint64_t fuzz_now_ns;
time_t fuzz_time(time_t *now);
int fuzz_clock_gettime(clockid_t clock, struct timespec *now);
int fuzz_clock_settime(clockid_t clock, const struct timespec *time);
/* Always the same bytes. */
ssize_t fuzz_getrandom(void *to, size_t bytes, unsigned flags);
/* Memory that a byte too far is seen in. */
void *fuzz_mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset);
int fuzz_munmap(void *at, size_t bytes);
/* Defined by targets that reach them. */
int fuzz_kill(pid_t pid, int number);
void fuzz__exit(int status) __attribute__((noreturn));
int fuzz_connect(int fd, const struct sockaddr *to, unsigned bytes);

#endif
