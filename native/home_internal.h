/* What home.c (turns and lanes) and home_thread.c (a thread that takes them) share. */
#ifndef AV_HOME_INTERNAL_H
#define AV_HOME_INTERNAL_H

#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/epoll.h>

#include "home.h"
#include "kicks.h"
#include "lane.h"

#define AV_HOME_EVENTS 64

/* A place for a lane. Events carry its number and generation: one that was fetched before its
 * lane went must not reach the next in the same place. */
struct av_home_slot {
    struct av_lane *lane;
    uint32_t generation;
};

struct av_home {
    int epoll_fd;
    int wake_fd;   /* makes epoll_wait() return: something is runnable, or the thread is to end */
    int notice_fd;
    int timer_fd;  /* a lane that did not listen is to do so again */
    pthread_mutex_t lock; /* all lanes, and the slots */
    _Atomic uint32_t wanted; /* how many threads wait for the lock while lanes run */
    struct av_home_slot *slot;
    uint32_t slots;
    struct av_home_stats stats;
    struct av_kicks kicks;
    pthread_t thread;
    bool has_thread;
    atomic_bool ending;
    sem_t gone;  /* the thread does not touch the home any more */
    bool leaves; /* a lane was abandoned: the thread may not end, and nobody waits for that */
    uint64_t poll_max_ns;
};

/* An event's data: generation, slot and source of the lane it is for. */
static inline uint64_t av_lane_event_data(const struct av_lane *lane, uint32_t source)
{
    return (uint64_t)lane->home->slot[lane->slot].generation << 32 | lane->slot << 8 | source;
}

/* One visit to epoll_wait(), not with the lock held: what fired is runnable afterwards. */
int av_home_wait(struct av_home *home, struct epoll_event *events, int timeout_ms);
/* These with the lock held. */
void av_home_collect(struct av_home *home, const struct epoll_event *events, int count);
/* Run each runnable lane once. True when one is runnable still or again. */
bool av_home_round(struct av_home *home);
/* Ask all lanes' drivers for notifications. True when work had come, and a lane is runnable. */
bool av_home_arm(struct av_home *home);
/* Before a run for these sources: whether the guest kicked for a reason. */
void av_lane_judge_kicks(struct av_lane *lane, uint32_t ready);
/* The timer went off. */
void av_home_listen_again(struct av_home *home);
/* It takes no more chains, and its device is told. */
void av_lane_fail(struct av_lane *lane, int error);
void av_home_end_thread(struct av_home *home);

#endif
