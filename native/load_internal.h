/* What all loads have in common: time, latencies, threads that can be given up. */
#ifndef AV_LOAD_INTERNAL_H
#define AV_LOAD_INTERNAL_H

#include <stdatomic.h>
#include <stdbool.h>
#include <time.h>

#include "load.h"

/* Latencies in 16 steps an octave, from 1 ns up: within 6 percent of the truth. */
#define AV_HISTOGRAM_STEPS 16
#define AV_HISTOGRAM_BUCKETS (AV_HISTOGRAM_STEPS * 40)

struct av_histogram {
    uint64_t count[AV_HISTOGRAM_BUCKETS];
};

void av_histogram_add(struct av_histogram *histogram, uint64_t ns);
/* The latency that `part` (0..1) of the requests did not exceed. */
uint64_t av_histogram_quantile(const struct av_histogram *histogram, double part);

/* One queue's thread. give_up is set for it when the device takes too long. */
struct av_load_thread {
    struct av_vdriver *driver;
    const struct av_gmem *mem;
    const struct av_load *load;
    const void *kind; /* of the load: struct av_load_blk, ... */
    uint32_t index;
    uint32_t queues;
    atomic_bool give_up;
    struct av_histogram latencies;
    struct av_load_result result; /* without the quantiles */
    int error;
};

typedef int av_load_body(struct av_load_thread *thread);

/* Run `body` in a thread for each queue and add up what they leave. */
int av_load_run_threads(struct av_vdriver *const *drivers, const struct av_gmem *mem,
                        uint32_t queues, const struct av_load *load, const void *kind,
                        av_load_body *body, struct av_load_result *out);

static inline uint64_t av_load_now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

#endif
