#define _GNU_SOURCE /* pthread_timedjoin_np */

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "load_internal.h"
#include "vdriver_internal.h"

void av_histogram_add(struct av_histogram *histogram, uint64_t ns)
{
    uint32_t octave = ns < 2 * AV_HISTOGRAM_STEPS ? 0 : 59u - (uint32_t)__builtin_clzll(ns);
    uint64_t bucket = octave * AV_HISTOGRAM_STEPS + (ns >> octave);

    if (bucket >= AV_HISTOGRAM_BUCKETS)
        bucket = AV_HISTOGRAM_BUCKETS - 1;
    histogram->count[bucket]++;
}

uint64_t av_histogram_quantile(const struct av_histogram *histogram, double part)
{
    uint64_t total = 0, seen = 0;

    for (uint32_t i = 0; i < AV_HISTOGRAM_BUCKETS; i++)
        total += histogram->count[i];
    for (uint32_t i = 0; i < AV_HISTOGRAM_BUCKETS; i++) {
        seen += histogram->count[i];
        if (seen != 0 && (double)seen >= part * (double)total) {
            uint32_t octave = i < 2 * AV_HISTOGRAM_STEPS ? 0 : i / AV_HISTOGRAM_STEPS - 1;
            return (uint64_t)(i - octave * AV_HISTOGRAM_STEPS) << octave;
        }
    }
    return 0;
}

struct runner {
    struct av_load_thread thread;
    av_load_body *body;
    pthread_t id;
    bool started;
};

static uint64_t thread_cpu_ns(void)
{
    struct timespec used;

    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
    return (uint64_t)used.tv_sec * 1000000000u + (uint64_t)used.tv_nsec;
}

static void *run(void *argument)
{
    struct runner *runner = argument;
    struct av_load_thread *thread = &runner->thread;
    struct av_vdriver_stats before, after;
    uint64_t cpu_ns = thread_cpu_ns(), began_ns = av_load_now_ns();

    av_vdriver_statistics(thread->driver, &before);
    thread->error = runner->body(thread);
    av_vdriver_statistics(thread->driver, &after);
    thread->result.elapsed_ns = av_load_now_ns() - began_ns;
    thread->result.cpu_ns = thread_cpu_ns() - cpu_ns;
    thread->result.kicks = after.kicks - before.kicks;
    thread->result.interrupts = after.interrupts - before.interrupts;
    return NULL;
}

/* Wait for a thread; one that is not done in time is told to give up, and woken. */
static void join(struct runner *runner, const struct timespec *until)
{
    uint64_t one = 1;
    int call_fd = runner->thread.driver->call_fd;

    if (pthread_timedjoin_np(runner->id, NULL, until) == 0)
        return;
    atomic_store(&runner->thread.give_up, true);
    if (call_fd >= 0 && write(call_fd, &one, sizeof(one)) < 0 && errno != EAGAIN)
        abort(); /* an eventfd of ours that cannot be written: the thread would never end */
    pthread_join(runner->id, NULL);
}

static void add_up(const struct av_load_thread *thread, struct av_histogram *latencies,
                   struct av_load_result *out)
{
    const struct av_load_result *one = &thread->result;

    out->requests += one->requests;
    out->errors += one->errors;
    out->mismatches += one->mismatches;
    out->cpu_ns += one->cpu_ns;
    out->kicks += one->kicks;
    out->interrupts += one->interrupts;
    if (one->elapsed_ns > out->elapsed_ns)
        out->elapsed_ns = one->elapsed_ns;
    for (uint32_t i = 0; i < AV_HISTOGRAM_BUCKETS; i++)
        latencies->count[i] += thread->latencies.count[i];
}

int av_load_run_threads(struct av_vdriver *const *drivers, const struct av_gmem *mem,
                        uint32_t queues, const struct av_load *load, const void *kind,
                        av_load_body *body, struct av_load_result *out)
{
    struct runner *runners = calloc(queues, sizeof(*runners));
    struct av_histogram latencies = { 0 };
    struct timespec until;
    int error = 0;

    if (runners == NULL)
        return -ENOMEM;
    memset(out, 0, sizeof(*out));
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += (time_t)((load->duration_ns + load->timeout_ns) / 1000000000u) + 1;
    for (uint32_t i = 0; i < queues && error == 0; i++) {
        struct av_load_thread *thread = &runners[i].thread;
        thread->driver = drivers[i];
        thread->mem = mem;
        thread->load = load;
        thread->kind = kind;
        thread->index = i;
        thread->queues = queues;
        runners[i].body = body;
        error = -pthread_create(&runners[i].id, NULL, run, &runners[i]);
        runners[i].started = error == 0;
    }
    for (uint32_t i = 0; i < queues; i++) {
        if (!runners[i].started)
            continue;
        join(&runners[i], &until);
        add_up(&runners[i].thread, &latencies, out);
        if (error == 0)
            error = runners[i].thread.error;
    }
    out->p50_ns = av_histogram_quantile(&latencies, 0.50);
    out->p99_ns = av_histogram_quantile(&latencies, 0.99);
    free(runners);
    return error;
}
