/* Lanes that are not listened to for a moment, because their guest kicks in vain (kicks.h). */
#include <errno.h>
#include <stdlib.h>
#include <sys/timerfd.h>
#include <time.h>

#include "home_internal.h"

#define SECOND_NS 1000000000u

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * SECOND_NS + (uint64_t)now.tv_nsec;
}

static int listen_to_kicks(struct av_lane *lane, bool listen)
{
    for (uint32_t i = 0; i < lane->kicks; i++) {
        struct epoll_event event = { .events = (listen ? EPOLLIN : 0) | EPOLLET,
                                     .data.u64 = av_lane_event_data(lane, i) };

        if (lane->source[i].fd >= 0 &&
            epoll_ctl(lane->home->epoll_fd, EPOLL_CTL_MOD, lane->source[i].fd, &event) < 0)
            return -errno;
    }
    return 0;
}

/* Wake for the first that has to listen again. */
static void set_timer(struct av_home *home)
{
    struct itimerspec at = { 0 };
    uint64_t first_ns = UINT64_MAX;

    for (uint32_t i = 0; i < home->slots; i++) {
        const struct av_lane *lane = home->slot[i].lane;

        if (lane != NULL && lane->deaf_until_ns != 0 && lane->deaf_until_ns < first_ns)
            first_ns = lane->deaf_until_ns;
    }
    if (first_ns == UINT64_MAX)
        return;
    at.it_value.tv_sec = (time_t)(first_ns / SECOND_NS);
    at.it_value.tv_nsec = (long)(first_ns % SECOND_NS);
    if (timerfd_settime(home->timer_fd, TFD_TIMER_ABSTIME, &at, NULL) < 0)
        abort(); /* it can fail for a bad time or descriptor only, and the lane would hang */
}

void av_home_listen_again(struct av_home *home)
{
    uint64_t now = now_ns();

    for (uint32_t i = 0; i < home->slots; i++) {
        struct av_lane *lane = home->slot[i].lane;
        int result;

        if (lane == NULL || lane->deaf_until_ns == 0 || lane->deaf_until_ns > now)
            continue;
        lane->deaf_until_ns = 0;
        lane->runnable = true;
        /* Nobody drains the descriptors, so epoll tells at once of the kicks that made it deaf. */
        lane->listens_anew = true;
        result = listen_to_kicks(lane, true);
        if (result < 0)
            av_lane_fail(lane, result);
    }
    set_timer(home);
}

void av_lane_judge_kicks(struct av_lane *lane, uint32_t ready)
{
    uint64_t now, deaf_ns, taken;
    int result;
    bool kicked = (ready & ((1u << lane->kicks) - 1)) != 0;

    if (lane->kicks == 0)
        return;
    taken = lane->ops->taken(lane);
    if (kicked && lane->listens_anew) {
        lane->listens_anew = false;
        kicked = false;
    }
    if (taken > lane->taken)
        av_kicks_worked(&lane->home->kicks, taken - lane->taken);
    lane->taken = taken;
    if (kicked && lane->deaf_until_ns == 0 && !lane->ops->pending(lane)) {
        now = now_ns();
        deaf_ns = av_kicks_vain(&lane->home->kicks, now);
        if (deaf_ns == 0)
            return;
        result = listen_to_kicks(lane, false);
        if (result < 0)
            av_lane_fail(lane, result);
        lane->deaf_until_ns = now + deaf_ns;
        set_timer(lane->home);
    }
}
