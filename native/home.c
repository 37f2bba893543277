#include "home_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

#define WAKE_EVENT UINT64_MAX
#define TIMER_EVENT (UINT64_MAX - 1)
#define ROUNDS_A_TURN 4

static void signal_fd(int fd)
{
    uint64_t one = 1;

    /* Full (EAGAIN): as many events are waiting as anybody can want. */
    if (write(fd, &one, sizeof(one)) < 0)
        return;
}

/* --- the home -------------------------------------------------------------------------- */

static int open_descriptors(struct av_home *home)
{
    struct epoll_event event = { .events = EPOLLIN | EPOLLET, .data.u64 = WAKE_EVENT };
    struct epoll_event timer = { .events = EPOLLIN | EPOLLET, .data.u64 = TIMER_EVENT };

    home->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    home->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    home->notice_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    home->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    if (home->epoll_fd < 0 || home->wake_fd < 0 || home->notice_fd < 0 || home->timer_fd < 0 ||
        epoll_ctl(home->epoll_fd, EPOLL_CTL_ADD, home->wake_fd, &event) < 0 ||
        epoll_ctl(home->epoll_fd, EPOLL_CTL_ADD, home->timer_fd, &timer) < 0)
        return errno;
    return 0;
}

static void close_fd(int fd)
{
    if (fd >= 0)
        close(fd);
}

struct av_home *av_home_create(int *error)
{
    struct av_home *home = calloc(1, sizeof(*home));

    if (home == NULL) {
        *error = ENOMEM;
        return NULL;
    }
    home->epoll_fd = home->wake_fd = home->notice_fd = home->timer_fd = -1;
    av_kicks_init(&home->kicks, 0, 0, 0);
    pthread_mutex_init(&home->lock, NULL);
    *error = open_descriptors(home);
    if (*error != 0) {
        av_home_destroy(home);
        return NULL;
    }
    return home;
}

void av_home_destroy(struct av_home *home)
{
    if (home == NULL)
        return;
    av_home_end_thread(home);
    close_fd(home->epoll_fd);
    close_fd(home->wake_fd);
    close_fd(home->notice_fd);
    close_fd(home->timer_fd);
    pthread_mutex_destroy(&home->lock);
    free(home->slot);
    free(home);
}

int av_home_fd(const struct av_home *home)
{
    return home->epoll_fd;
}

int av_home_notice_fd(const struct av_home *home)
{
    return home->notice_fd;
}

/* The thread that runs lanes holds the lock nearly always, and a mutex is not fair: it looks at
 * `wanted` and steps back. */
static void lock(struct av_home *home)
{
    atomic_fetch_add(&home->wanted, 1);
    pthread_mutex_lock(&home->lock);
    atomic_fetch_sub(&home->wanted, 1);
}

static void unlock(struct av_home *home)
{
    pthread_mutex_unlock(&home->lock);
}

void av_home_statistics(struct av_home *home, struct av_home_stats *out)
{
    lock(home);
    *out = home->stats;
    out->vain_kicks = home->kicks.vain;
    out->deaf = home->kicks.deaf;
    unlock(home);
}

void av_home_limit_kicks(struct av_home *home, uint64_t free, uint64_t burst)
{
    lock(home);
    av_kicks_init(&home->kicks, 0, free, burst);
    unlock(home);
}

/* --- turns ----------------------------------------------------------------------------- */

int av_home_wait(struct av_home *home, struct epoll_event *events, int timeout_ms)
{
    int count = epoll_wait(home->epoll_fd, events, AV_HOME_EVENTS, timeout_ms);

    return count < 0 ? 0 : count; /* EINTR: nothing came yet */
}

void av_home_collect(struct av_home *home, const struct epoll_event *events, int count)
{
    home->stats.turns++;
    for (int i = 0; i < count; i++) {
        uint64_t data = events[i].data.u64;
        uint32_t slot = (uint32_t)data >> 8, source = data & 0xff;
        struct av_lane *lane;

        if (data == TIMER_EVENT)
            av_home_listen_again(home);
        if (data == TIMER_EVENT || data == WAKE_EVENT || slot >= home->slots ||
            home->slot[slot].generation != (uint32_t)(data >> 32))
            continue;
        lane = home->slot[slot].lane;
        if (lane == NULL || !lane->registered)
            continue;
        lane->ready |= 1u << source;
        lane->runnable = true;
    }
}

static void unregister(struct av_lane *lane)
{
    lane->deaf_until_ns = 0;
    lane->listens_anew = false;
    for (uint32_t i = 0; i < lane->sources; i++)
        if (lane->source[i].fd >= 0)
            epoll_ctl(lane->home->epoll_fd, EPOLL_CTL_DEL, lane->source[i].fd, NULL);
    lane->registered = false;
    lane->runnable = false;
    lane->armed = false;
    lane->ready = 0;
}

static void give_notice(struct av_lane *lane, uint32_t notice)
{
    lane->notice |= notice;
    signal_fd(lane->home->notice_fd);
}

static void stop_taking(struct av_lane *lane)
{
    lane->taking = false;
    if (lane->ops->hold != NULL)
        lane->ops->hold(lane);
}

void av_lane_fail(struct av_lane *lane, int error)
{
    if (lane->error != 0)
        return;
    /* What is in flight still has to come to its end before anybody may touch its memory. */
    lane->error = error;
    stop_taking(lane);
    give_notice(lane, AV_LANE_FAILED);
}

static void run(struct av_lane *lane)
{
    uint32_t ready = lane->ready;
    int result;

    av_lane_judge_kicks(lane, ready);
    lane->home->stats.runs++;
    lane->runnable = false;
    lane->armed = false;
    lane->ready = 0;
    result = lane->ops->run(lane, ready);
    if (result < 0)
        av_lane_fail(lane, result);
    lane->runnable = result > 0;
    if (!lane->taking && lane->ops->idle(lane)) {
        unregister(lane);
        give_notice(lane, AV_LANE_RESTED);
    }
}

bool av_home_round(struct av_home *home)
{
    bool more = false;

    for (uint32_t i = 0; i < home->slots; i++) {
        struct av_lane *lane = home->slot[i].lane;

        if (lane != NULL && lane->runnable)
            run(lane);
        more |= lane != NULL && lane->runnable;
    }
    return more;
}

bool av_home_arm(struct av_home *home)
{
    bool more = false;

    for (uint32_t i = 0; i < home->slots; i++) {
        struct av_lane *lane = home->slot[i].lane;

        if (lane == NULL || !lane->registered || lane->armed || lane->runnable)
            continue;
        lane->armed = true;
        lane->runnable = lane->ops->arm(lane);
        more |= lane->runnable;
    }
    return more;
}

int av_home_turn(struct av_home *home)
{
    struct epoll_event events[AV_HOME_EVENTS];
    int count = av_home_wait(home, events, 0);
    bool more = true;

    lock(home);
    av_home_collect(home, events, count);
    for (int round = 0; round < ROUNDS_A_TURN && more; round++)
        more = av_home_round(home) || av_home_arm(home);
    unlock(home);
    return more;
}

/* --- lanes ----------------------------------------------------------------------------- */

static int take_slot(struct av_home *home, struct av_lane *lane)
{
    struct av_home_slot *slot;

    for (lane->slot = 0; lane->slot < home->slots; lane->slot++)
        if (home->slot[lane->slot].lane == NULL)
            break;
    if (lane->slot == home->slots) {
        slot = realloc(home->slot, (home->slots + 1) * sizeof(*slot));
        if (slot == NULL)
            return -ENOMEM;
        home->slot = slot;
        home->slot[home->slots++] = (struct av_home_slot){ 0 };
    }
    home->slot[lane->slot].lane = lane;
    home->slot[lane->slot].generation++;
    return 0;
}

int av_lane_init(struct av_lane *lane, struct av_home *home, const struct av_lane_ops *ops,
                 uint32_t kicks)
{
    int result;

    memset(lane, 0, sizeof(*lane));
    lane->ops = ops;
    lane->kicks = kicks;
    for (uint32_t i = 0; i < kicks; i++)
        av_lane_add_source(lane, -1, EPOLLIN);
    lock(home);
    result = take_slot(home, lane);
    unlock(home);
    if (result == 0)
        lane->home = home;
    return result;
}

void av_lane_fini(struct av_lane *lane)
{
    if (lane->home == NULL)
        return;
    lock(lane->home);
    if (lane->registered)
        abort(); /* its home would go on with freed memory */
    lane->home->slot[lane->slot].lane = NULL;
    unlock(lane->home);
    lane->home = NULL;
}

void av_lane_abandon(struct av_lane *lane)
{
    lock(lane->home);
    stop_taking(lane);
    if (lane->registered) {
        unregister(lane);
        lane->home->leaves = true;
    }
    unlock(lane->home);
}

uint32_t av_lane_add_source(struct av_lane *lane, int fd, uint32_t epoll_events)
{
    if (lane->sources == AV_LANE_SOURCES_MAX)
        abort(); /* a device's sources are fixed when it is written */
    lane->source[lane->sources] = (struct av_source){ .fd = fd, .events = epoll_events };
    return lane->sources++;
}

void av_lane_set_kick(struct av_lane *lane, uint32_t index, int kick_fd)
{
    lock(lane->home);
    if (!lane->registered)
        lane->source[index].fd = kick_fd;
    unlock(lane->home);
}

void av_lane_lock(struct av_lane *lane)
{
    lock(lane->home);
}

void av_lane_unlock(struct av_lane *lane)
{
    unlock(lane->home);
}

void av_lane_wake(struct av_lane *lane)
{
    if (!lane->registered)
        return;
    lane->runnable = true;
    signal_fd(lane->home->wake_fd);
}

void av_lane_news(struct av_lane *lane)
{
    give_notice(lane, AV_LANE_NEWS);
}

static int watch_source(struct av_lane *lane, uint32_t index)
{
    const struct av_source *source = &lane->source[index];
    struct epoll_event event = { .events = source->events | EPOLLET,
                                 .data.u64 = av_lane_event_data(lane, index) };

    if (source->fd >= 0 &&
        epoll_ctl(lane->home->epoll_fd, EPOLL_CTL_ADD, source->fd, &event) < 0)
        return -errno;
    return 0;
}

int av_lane_watch(struct av_lane *lane, int fd)
{
    uint32_t index = av_lane_add_source(lane, fd, EPOLLIN);
    int result = lane->registered ? watch_source(lane, index) : 0;

    if (result < 0)
        lane->sources--;
    return result;
}

static int watch_sources(struct av_lane *lane)
{
    int result = 0;

    for (uint32_t i = 0; i < lane->sources && result == 0; i++)
        result = watch_source(lane, i);
    if (result < 0)
        unregister(lane);
    return result;
}

int av_lane_start(struct av_lane *lane)
{
    int result = 0;

    lock(lane->home);
    if (!lane->registered) {
        result = watch_sources(lane);
        lane->notice = 0;
        lane->error = 0;
    }
    if (result == 0) {
        lane->registered = lane->taking = true;
        /* The driver may have offered chains while its kicks were switched off. */
        av_lane_wake(lane);
    }
    unlock(lane->home);
    return result;
}

int av_lane_hold(struct av_lane *lane)
{
    int rested;

    lock(lane->home);
    stop_taking(lane);
    if (lane->registered && lane->ops->idle(lane))
        unregister(lane);
    rested = !lane->registered;
    unlock(lane->home);
    return rested;
}

uint32_t av_lane_notice(struct av_lane *lane)
{
    uint32_t notice;

    lock(lane->home);
    notice = lane->notice;
    lane->notice = 0;
    unlock(lane->home);
    return notice;
}

int av_lane_error(const struct av_lane *lane)
{
    int error;

    lock(lane->home);
    error = lane->error;
    unlock(lane->home);
    return error;
}
