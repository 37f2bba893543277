/* Inside of a lane, for the devices that embed one. */
#ifndef AV_LANE_H
#define AV_LANE_H

#include <stdbool.h>
#include <stdint.h>

#include "home.h"

#define AV_LANE_SOURCES_MAX 8u

/* All but `pending` are called with the home's lock held, on the thread that takes its turns. */
struct av_lane_ops {
    /* Do a bounded amount of work with kicks switched off. ready: a bit for each source that
     * fired since the last run. When `lane->taking` is false take no more chains, and only bring
     * what is in flight to its end. 1 more to do, 0, or -errno. */
    int (*run)(struct av_lane *lane, uint32_t ready);
    /* Ask for notifications again. True when work came meanwhile, and the lane runs again. */
    bool (*arm)(struct av_lane *lane);
    /* Whether a run would find something to do, as far as memory tells; no system calls. */
    bool (*pending)(struct av_lane *lane);
    /* How many chains were taken so far. NULL: of a lane without kicks. */
    uint64_t (*taken)(const struct av_lane *lane);
    /* Whether nothing is in flight. */
    bool (*idle)(const struct av_lane *lane);
    /* `lane->taking` has become false: do not wait for permission to take any. NULL: it never does. */
    void (*hold)(struct av_lane *lane);
};

/* Edge-triggered: an event says that something came since the last one, so nobody has to drain
 * the descriptor. */
struct av_source {
    int fd; /* borrowed; -1: none */
    uint32_t events;
};

/* First in a device's own struct. */
struct av_lane {
    const struct av_lane_ops *ops;
    struct av_home *home;
    bool taking;     /* chains may be taken */
    /* The rest is the home's. */
    bool registered; /* its sources are watched */
    bool runnable;   /* a run is due */
    bool armed;      /* notifications are asked for */
    uint32_t ready;
    uint32_t notice;
    int error;
    uint32_t slot;
    uint64_t taken;      /* chains, when kicks were judged last */
    uint32_t kicks;      /* so many of the sources, the first */
    uint64_t deaf_until_ns; /* 0: it listens to them */
    bool listens_anew;      /* the next event of theirs may be of a kick that was looked into */
    uint32_t sources;
    struct av_source source[AV_LANE_SOURCES_MAX];
};

/* Sources 0..kicks-1 are kick descriptors, see av_lane_set_kick(). 0 or -ENOMEM. */
int av_lane_init(struct av_lane *lane, struct av_home *home, const struct av_lane_ops *ops,
                 uint32_t kicks);
/* The lane must be at rest. Nothing when it was never initialized. */
void av_lane_fini(struct av_lane *lane);
/* A descriptor of the device's own, borrowed; its source number. Before the lane starts. */
uint32_t av_lane_add_source(struct av_lane *lane, int fd, uint32_t epoll_events);
/* So at any time, with the lock held, for EPOLLIN. 0 or -errno. */
int av_lane_watch(struct av_lane *lane, int fd);
/* It is at rest from now on, whatever is in flight. */
void av_lane_abandon(struct av_lane *lane);
/* For changes to what runs use, from other threads. */
void av_lane_lock(struct av_lane *lane);
void av_lane_unlock(struct av_lane *lane);
/* Run soon, if it takes chains: what it works on changed. With the lock held. */
void av_lane_wake(struct av_lane *lane);
/* Tell the loop to ask the device, by AV_LANE_NEWS. With the lock held. */
void av_lane_news(struct av_lane *lane);

#endif
