/* Homes and lanes: where queue work runs.
 *
 * A lane is one unit of queue work: one or a few rings and what stands behind them. A home runs
 * lanes, on whatever thread takes its turns: the asyncio loop, which watches the home's
 * descriptor, or a thread of its own. There is one datapath for both. */
#ifndef AV_HOME_H
#define AV_HOME_H

#include <stdint.h>

/* cdef begin */
struct av_home_stats {
    uint64_t turns;    /* visits to epoll_wait() */
    uint64_t runs;     /* of lanes */
    uint64_t sleeps;   /* of the home's thread */
    uint64_t poll_hits;  /* polls that found work before they gave up */
    uint64_t poll_ns;  /* spent polling in vain */
    uint64_t vain_kicks; /* and times a lane did not listen for a moment, see kicks.h */
    uint64_t deaf;
};

/* Any thread may call these; those that name no lane or lock wait for nothing. */
struct av_home;
struct av_home *av_home_create(int *error); /* NULL: *error is the errno */
/* No lane may be left; ends the thread. */
void av_home_destroy(struct av_home *home);
/* Readable when a turn has something to do; for a home without a thread. */
int av_home_fd(const struct av_home *home);
/* Readable when a lane rests, failed or has news: then ask each by av_lane_notice(). Drain it. */
int av_home_notice_fd(const struct av_home *home);
/* Run what is ready, a bounded amount, without waiting. 1 when there is more to do. */
int av_home_turn(struct av_home *home);
/* Give the home a thread of its own, which looks for new work for up to poll_ns before it sleeps,
 * and for less where that was in vain. 0 or -errno. */
int av_home_start_thread(struct av_home *home, uint64_t poll_ns);
/* Other bounds of kicks in vain than kicks.h has, for those who know their guests, and tests. */
void av_home_limit_kicks(struct av_home *home, uint64_t free, uint64_t burst);
void av_home_statistics(struct av_home *home, struct av_home_stats *out);

/* A lane is made by its device and belongs to one home for all its life, at rest at first. */
struct av_lane;
/* AV_LANE_NEWS: the device itself has something to tell. */
enum av_lane_notice { AV_LANE_RESTED = 1, AV_LANE_FAILED = 2, AV_LANE_NEWS = 4 };
/* The descriptor that announces chains on the lane's ring `index`; borrowed, -1: none. Nothing when
 * the lane runs. */
void av_lane_set_kick(struct av_lane *lane, uint32_t index, int kick_fd);
/* Take chains, beginning with those already there. 0 or -errno. Nothing when it runs. */
int av_lane_start(struct av_lane *lane);
/* Take no more chains. 1 when the lane is at rest: nothing is in flight and its home does not
 * touch it any more. 0 when that is still to come, with a notice. */
int av_lane_hold(struct av_lane *lane);
/* av_lane_notice bits since the last call. */
uint32_t av_lane_notice(struct av_lane *lane);
/* Why it failed, -errno; 0 when it did not. */
int av_lane_error(const struct av_lane *lane);
/* cdef end */

#endif
