/* A home's own thread: turns one after the other, and what it does when there is nothing to do.
 *
 * A wake-up costs tens of microseconds, more than most requests. So before it sleeps the thread
 * looks at its lanes' memory for a while. How long follows what it was worth: a sleep that turned
 * out to be shorter than the bound makes the next look longer, one that was longer ends looking
 * altogether, so that an idle guest costs nothing. */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include "home_internal.h"
#include "walls.h"

#define POLL_FIRST_NS 8000u
#define EPOLL_EVERY_NS 4000u

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Tells the processor that this is a spin, for the good of its other thread. */
static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Let others in who want the lock; called with it held. */
static void step_back(struct av_home *home)
{
    if (atomic_load_explicit(&home->wanted, memory_order_relaxed) == 0)
        return;
    pthread_mutex_unlock(&home->lock);
    while (atomic_load(&home->wanted) != 0)
        sched_yield();
    pthread_mutex_lock(&home->lock);
}

/* Run what is runnable until nothing is, taking in events now and then; with the lock held. */
static void work(struct av_home *home)
{
    struct epoll_event events[AV_HOME_EVENTS];

    while (av_home_round(home) && !atomic_load_explicit(&home->ending, memory_order_relaxed)) {
        step_back(home);
        av_home_collect(home, events, av_home_wait(home, events, 0));
    }
}

static bool find_pending(struct av_home *home)
{
    bool found = false;

    for (uint32_t i = 0; i < home->slots; i++) {
        struct av_lane *lane = home->slot[i].lane;

        if (lane != NULL && lane->registered && lane->ops->pending(lane))
            found = lane->runnable = true;
    }
    return found;
}

/* Look for work for at most `limit_ns`; true when there is some. With the lock held. */
static bool poll(struct av_home *home, uint64_t limit_ns)
{
    struct epoll_event events[AV_HOME_EVENTS];
    uint64_t began = now_ns(), now = began, asked = began;

    while (now - began < limit_ns) {
        if (find_pending(home)) {
            home->stats.poll_hits++;
            return true;
        }
        step_back(home);
        if (atomic_load_explicit(&home->ending, memory_order_relaxed))
            return true;
        now = now_ns();
        if (now - asked >= EPOLL_EVERY_NS) {
            /* What memory does not show, as a TAP; and the kernel delivers completions. */
            int count = av_home_wait(home, events, 0);
            if (count != 0) {
                av_home_collect(home, events, count);
                home->stats.poll_hits++;
                return true;
            }
            asked = now;
        }
        relax();
    }
    home->stats.poll_ns += now - began;
    return false;
}

/* How long to look next time, after a sleep of `slept_ns`. */
static uint64_t adapt(const struct av_home *home, uint64_t limit_ns, uint64_t slept_ns)
{
    if (slept_ns > home->poll_max_ns)
        return 0;
    limit_ns = limit_ns == 0 ? POLL_FIRST_NS : 2 * limit_ns;
    return limit_ns < home->poll_max_ns ? limit_ns : home->poll_max_ns;
}

static void *thread_main(void *argument)
{
    struct av_home *home = argument;
    struct epoll_event events[AV_HOME_EVENTS];
    uint64_t limit_ns = home->poll_max_ns, slept_at;
    int count;

    av_walls_thread(AV_ROLE_IO);
    pthread_mutex_lock(&home->lock);
    while (!atomic_load(&home->ending)) {
        step_back(home);
        work(home);
        if (limit_ns != 0 && poll(home, limit_ns))
            continue;
        if (av_home_arm(home))
            continue;
        /* work() may have taken in the event that announces the end, after it looked. */
        if (atomic_load(&home->ending))
            break;
        home->stats.sleeps++;
        slept_at = now_ns();
        pthread_mutex_unlock(&home->lock);
        count = av_home_wait(home, events, -1);
        pthread_mutex_lock(&home->lock);
        av_home_collect(home, events, count);
        if (home->poll_max_ns != 0)
            limit_ns = adapt(home, limit_ns, now_ns() - slept_at);
    }
    pthread_mutex_unlock(&home->lock);
    sem_post(&home->gone);
    return NULL;
}

int av_home_start_thread(struct av_home *home, uint64_t poll_ns)
{
    sigset_t all, before;
    int result;

    home->poll_max_ns = poll_ns;
    sem_init(&home->gone, 0, 0);
    /* It takes no signals: those are for the program's own threads. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    result = pthread_create(&home->thread, NULL, thread_main, home);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (result == 0) {
        home->has_thread = true;
        pthread_setname_np(home->thread, "avmm-io");
    }
    return -result;
}

void av_home_end_thread(struct av_home *home)
{
    uint64_t one = 1;

    if (!home->has_thread)
        return;
    atomic_store(&home->ending, true);
    /* Nobody drains it, and it cannot be full all the same: that takes 2^64 starts of lanes. */
    while (write(home->wake_fd, &one, sizeof(one)) < 0 && errno == EINTR)
        continue;
    while (sem_wait(&home->gone) < 0)
        continue;
    /* The kernel ends a thread only when the io_uring requests that it has made are over. */
    if (home->leaves)
        pthread_detach(home->thread);
    else
        pthread_join(home->thread, NULL);
    sem_destroy(&home->gone);
    home->has_thread = false;
}
