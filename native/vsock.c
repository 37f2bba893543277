#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "vsock_internal.h"
#include "walls.h"

#define RX 0u
#define TX 1u
#define HOLD_NS 5000000
/* So many packets at most speak by one interrupt: a driver must not run out of room. */
#define TX_HELD_MAX 32u
/* A guest that waits for the answer does not wait often: holds in vain become rare. */
#define SKIP_FIRST 16u
#define SKIP_DOUBLINGS 8u
#define EVENTS 64
#define EVENT_ROUNDS 16

static struct av_vsock *of(struct av_lane *lane)
{
    return (struct av_vsock *)lane;
}

uint64_t av_vsock_now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void av_vsock_tell(struct av_vsock *vsock, uint32_t news)
{
    bool fresh = vsock->news == 0;

    vsock->news |= news;
    if (fresh && vsock->setup.announces)
        av_lane_news(&vsock->lane);
}

/* --- interrupts ------------------------------------------------------------------------- */

/* Whether something ends the hold. A timer that is set goes on, so that it costs no call a packet. */
static bool set_timer(struct av_vsock *vsock)
{
    const struct itimerspec at = { .it_value.tv_nsec = HOLD_NS };

    if (!vsock->timer_set)
        vsock->timer_set = timerfd_settime(vsock->timer_fd, 0, &at, NULL) == 0;
    return vsock->timer_set;
}

static void flush_tx(struct av_vsock *vsock)
{
    vsock->tx_held = vsock->tx_fresh = 0;
    av_vring_flush(vsock->tx);
}

static void flush_rx(struct av_vsock *vsock)
{
    vsock->rx_held = vsock->rx_urgent = false;
    av_vring_flush(vsock->rx);
}

void av_vsock_announce_tx(struct av_vsock *vsock, uint32_t taken)
{
    struct av_vring_stats stats;

    if (taken == 0)
        return;
    av_vring_show(vsock->tx);
    av_vring_statistics(vsock->tx, &stats);
    vsock->tx_held += taken;
    vsock->tx_fresh += taken;
    if (vsock->tx_held >= TX_HELD_MAX || vsock->tx_held >= stats.size / 4 ||
        !av_vring_interrupt_due(vsock->tx) || !set_timer(vsock))
        flush_tx(vsock);
}

void av_vsock_announce_rx(struct av_vsock *vsock)
{
    av_vring_show(vsock->rx);
    if (vsock->rx_urgent && vsock->rx_held)
        vsock->rx_in_vain = 0;
    if (vsock->rx_urgent || !av_vring_interrupt_due(vsock->rx)) {
        flush_rx(vsock);
    } else if (vsock->rx_skip != 0) {
        vsock->rx_skip--;
        flush_rx(vsock);
    } else {
        vsock->rx_held = set_timer(vsock);
        if (!vsock->rx_held)
            flush_rx(vsock);
    }
}

static void on_timer(struct av_vsock *vsock)
{
    vsock->timer_set = false;
    if (vsock->rx_held) {
        vsock->rx_skip = SKIP_FIRST << vsock->rx_in_vain;
        if (vsock->rx_in_vain < SKIP_DOUBLINGS)
            vsock->rx_in_vain++;
        flush_rx(vsock);
    }
    /* A guest that goes on sending has not run out of room. */
    if (vsock->tx_fresh != 0 && set_timer(vsock))
        vsock->tx_fresh = 0;
    else
        flush_tx(vsock);
}

/* --- the lane -------------------------------------------------------------------------- */

static void on_event(struct av_vsock *vsock, struct av_vsock_connection *connection,
                     uint32_t events)
{
    connection->readable = true;
    if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
        connection->ends = true;
    if (events & (EPOLLHUP | EPOLLERR))
        connection->hung_up = true;
    if (connection->hung_up &&
        (connection->state == AV_VSOCK_ASKED || av_vsock_is_aborted(connection))) {
        av_vsock_kill(vsock, connection, AV_VSOCK_NOT_SAID);
        return;
    }
    /* Nobody is there, and that will not be found out by reading. */
    if (connection->hung_up &&
        (connection->has_eof || (connection->guest_shut & AV_VSOCK_SHUT_RECEIVE)))
        av_vsock_shut(vsock, connection, AV_VSOCK_SHUT_BOTH);
    /* And what it left is not waited with for ever. */
    if (connection->hung_up && connection->state == AV_VSOCK_OPEN && connection->deadline_ns == 0)
        av_vsock_wait(vsock, connection, vsock->setup.close_ns);
    av_vsock_wake(vsock, connection);
    if (connection->held != 0 && (events & (EPOLLOUT | EPOLLHUP | EPOLLERR)))
        av_vsock_drain(vsock, connection);
}

static void collect(struct av_vsock *vsock)
{
    struct epoll_event events[EVENTS];
    int count = EVENTS;

    for (int round = 0; round < EVENT_ROUNDS && count == EVENTS; round++) {
        count = epoll_wait(vsock->sockets_fd, events, EVENTS, 0);
        for (int i = 0; i < count; i++)
            on_event(vsock, events[i].data.ptr, events[i].events);
    }
    vsock->more_events = count == EVENTS;
}

static void tell_room(struct av_vsock *vsock)
{
    vsock->python_starved = false;
    av_vsock_tell(vsock, AV_VSOCK_ROOM);
}

/* Whether more room in the receive ring would be of use. */
static bool wants_room(const struct av_vsock *vsock)
{
    return !vsock->python_turn && (vsock->rx_starved || vsock->python_starved);
}

/* As av_vsock_deliver(). Where there is too little room, Python has it in turns with the lane,
 * which is always quicker to take it. */
static int deliver(struct av_vsock *vsock)
{
    int result;

    if (vsock->python_starved && vsock->python_first && av_vring_pending(vsock->rx)) {
        vsock->python_turn = true;
        tell_room(vsock);
    }
    if (vsock->python_turn)
        return 0;
    result = av_vsock_deliver(vsock);
    if (vsock->python_starved && av_vring_pending(vsock->rx))
        tell_room(vsock);
    return result;
}

static int vsock_run(struct av_lane *lane, uint32_t ready)
{
    struct av_vsock *vsock = of(lane);
    int sent, came;

    if (ready & 1u << RX)
        av_vring_count_kick(vsock->rx);
    if (ready & 1u << TX)
        av_vring_count_kick(vsock->tx);
    if (!lane->taking)
        return 0;
    if (ready & 1u << vsock->timer_source)
        on_timer(vsock);
    if ((ready & 1u << vsock->sockets_source) || vsock->more_events)
        collect(vsock);
    came = av_vsock_transmit(vsock);
    av_vring_kicks_off(vsock->rx);
    sent = deliver(vsock);
    if (came < 0 || sent < 0)
        return came < 0 ? came : sent;
    return came | sent | vsock->more_events;
}

static bool vsock_arm(struct av_lane *lane)
{
    struct av_vsock *vsock = of(lane);
    bool more = false;

    if (!lane->taking)
        return false;
    if (!vsock->tx_blocked)
        more = av_vring_kicks_on(vsock->tx) != 0;
    if (wants_room(vsock))
        more |= av_vring_kicks_on(vsock->rx) != 0;
    return more;
}

static bool vsock_pending(struct av_lane *lane)
{
    struct av_vsock *vsock = of(lane);

    return lane->taking &&
           ((!vsock->tx_blocked && av_vring_pending(vsock->tx)) ||
            (wants_room(vsock) && av_vring_pending(vsock->rx)));
}

static uint64_t vsock_taken(const struct av_lane *lane)
{
    const struct av_vsock *vsock = (const struct av_vsock *)lane;

    return av_vring_taken(vsock->rx) + av_vring_taken(vsock->tx);
}

static bool vsock_idle(const struct av_lane *lane)
{
    (void)lane;
    return true; /* a run ends what it begins */
}

static void vsock_hold(struct av_lane *lane)
{
    flush_tx(of(lane));
    flush_rx(of(lane));
}

static const struct av_lane_ops lane_ops = {
    .run = vsock_run,
    .arm = vsock_arm,
    .pending = vsock_pending,
    .taken = vsock_taken,
    .idle = vsock_idle,
    .hold = vsock_hold,
};

/* --- the device ------------------------------------------------------------------------ */

static int set_up(struct av_vsock *vsock, struct av_home *home)
{
    int result;

    vsock->all.next = vsock->all.prev = &vsock->all;
    vsock->ready.next = vsock->ready.prev = &vsock->ready;
    vsock->inbox = malloc(sizeof(*vsock->inbox));
    vsock->taken = malloc(sizeof(*vsock->taken));
    if (vsock->setup.path != NULL)
        vsock->path = strdup(vsock->setup.path);
    if (vsock->inbox == NULL || vsock->taken == NULL ||
        (vsock->path == NULL && vsock->setup.path != NULL))
        return -ENOMEM;
    vsock->setup.path = vsock->path;
    vsock->inbox->count = vsock->inbox->bytes = 0;
    vsock->taken->count = vsock->taken->bytes = 0;
    if (getrandom(&vsock->seed, sizeof(vsock->seed), 0) != sizeof(vsock->seed))
        return -errno;
    vsock->sockets_fd = epoll_create1(EPOLL_CLOEXEC);
    vsock->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    if (vsock->sockets_fd < 0 || vsock->timer_fd < 0)
        return -errno;
    result = av_lane_init(&vsock->lane, home, &lane_ops, 2);
    if (result < 0)
        return result;
    vsock->sockets_source = av_lane_add_source(&vsock->lane, vsock->sockets_fd, EPOLLIN);
    vsock->timer_source = av_lane_add_source(&vsock->lane, vsock->timer_fd, EPOLLIN);
    return 0;
}

struct av_vsock *av_vsock_create(struct av_home *home, struct av_vring *rx, struct av_vring *tx,
                                 const struct av_vsock_setup *setup, int *error)
{
    struct av_vsock *vsock = calloc(1, sizeof(*vsock));

    *error = ENOMEM;
    if (vsock == NULL)
        return NULL;
    vsock->rx = rx;
    vsock->tx = tx;
    vsock->setup = *setup;
    vsock->walled = av_walls_up();
    vsock->sockets_fd = vsock->timer_fd = -1;
    *error = -set_up(vsock, home);
    if (*error != 0) {
        av_vsock_destroy(vsock);
        return NULL;
    }
    return vsock;
}

void av_vsock_destroy(struct av_vsock *vsock)
{
    av_lane_fini(&vsock->lane);
    while (vsock->all.next != NULL && vsock->all.next != &vsock->all)
        av_vsock_free(vsock, av_vsock_of_all(vsock->all.next));
    if (vsock->sockets_fd >= 0)
        close(vsock->sockets_fd);
    if (vsock->timer_fd >= 0)
        close(vsock->timer_fd);
    free(vsock->inbox);
    free(vsock->taken);
    free(vsock->served);
    free(vsock->path);
    free(vsock);
}

struct av_lane *av_vsock_lane(struct av_vsock *vsock)
{
    return &vsock->lane;
}

void av_vsock_statistics(struct av_vsock *vsock, struct av_vsock_stats *out)
{
    av_lane_lock(&vsock->lane);
    *out = vsock->stats;
    out->connections = vsock->connections;
    av_lane_unlock(&vsock->lane);
}

const uint32_t *av_vsock_news_bits(const struct av_vsock *vsock)
{
    return &vsock->news;
}

uint32_t av_vsock_news(struct av_vsock *vsock)
{
    uint32_t news;

    av_lane_lock(&vsock->lane);
    news = vsock->news;
    vsock->news = 0;
    av_lane_unlock(&vsock->lane);
    return news;
}

/* --- what Python does ------------------------------------------------------------------ */

uint32_t av_vsock_expire(struct av_vsock *vsock)
{
    uint64_t now_ns = av_vsock_now_ns();
    struct av_vsock_link *at, *next;
    uint32_t waiting;

    av_lane_lock(&vsock->lane);
    for (at = vsock->all.next; at != &vsock->all; at = next) {
        struct av_vsock_connection *connection = av_vsock_of_all(at);

        next = at->next;
        if (!vsock->lane.taking && connection->deadline_ns != 0 &&
            connection->state != AV_VSOCK_ASKED)
            av_vsock_wait(vsock, connection, vsock->setup.close_ns);
        else if (av_vsock_is_late(connection, now_ns))
            av_vsock_kill(vsock, connection, AV_VSOCK_LATE);
    }
    waiting = vsock->waiting;
    av_lane_wake(&vsock->lane);
    av_lane_unlock(&vsock->lane);
    return waiting;
}

void av_vsock_reset(struct av_vsock *vsock, uint32_t reason)
{
    struct av_vsock_link *at, *next;

    av_lane_lock(&vsock->lane);
    for (at = vsock->all.next; at != &vsock->all; at = next) {
        struct av_vsock_connection *connection = av_vsock_of_all(at);

        next = at->next;
        if (connection->state == AV_VSOCK_DEAD)
            av_vsock_bury(vsock, connection);
        else if (connection->state != AV_VSOCK_PYTHONS && connection->state != AV_VSOCK_DRAINING &&
                 !(connection->state == AV_VSOCK_ASKED &&
                   (connection->due & AV_VSOCK_DUE_REQUEST))) {
            av_vsock_tell_reason(connection, reason);
            av_vsock_free(vsock, connection);
        }
    }
    vsock->inbox->count = vsock->inbox->bytes = 0;
    vsock->tx_blocked = vsock->rx_starved = vsock->python_starved = false;
    vsock->python_first = vsock->python_turn = false;
    vsock->news &= AV_VSOCK_TIMER;
    av_lane_unlock(&vsock->lane);
}

uint32_t av_vsock_receive(struct av_vsock *vsock, struct av_vsock_batch *out)
{
    struct av_vsock_inbox *inbox;

    av_lane_lock(&vsock->lane);
    inbox = vsock->inbox;
    if (inbox->count != 0) {
        vsock->inbox = vsock->taken;
        vsock->inbox->count = vsock->inbox->bytes = 0;
        vsock->taken = inbox;
        if (vsock->tx_blocked)
            av_lane_wake(&vsock->lane);
    }
    *out = (struct av_vsock_batch){ .headers = inbox->headers,
                                    .data = inbox->data,
                                    .count = inbox->count,
                                    .bytes = inbox->bytes };
    av_lane_unlock(&vsock->lane);
    return out->count;
}

static void starve(struct av_vsock *vsock)
{
    vsock->python_starved = true;
    av_lane_wake(&vsock->lane); /* and so it asks for kicks */
}

int64_t av_vsock_put(struct av_vsock *vsock, const uint8_t *header, const uint8_t *data,
                     uint32_t bytes)
{
    struct av_vsock_header own;
    uint32_t done = 0;
    int64_t put = 0;

    memcpy(&own, header, sizeof(own));
    av_lane_lock(&vsock->lane);
    while (done < bytes && (put = av_vsock_put_packet(vsock, &own, data + done, bytes - done)) > 0)
        done += (uint32_t)put;
    if (put == -EAGAIN)
        starve(vsock);
    vsock->stats.tx_bytes += done;
    av_lane_unlock(&vsock->lane);
    return put == -EAGAIN || done != 0 ? done : put < 0 ? put : 0;
}

int av_vsock_put_header(struct av_vsock *vsock, const uint8_t *header)
{
    struct av_vsock_header own;
    int64_t put;

    memcpy(&own, header, sizeof(own));
    av_lane_lock(&vsock->lane);
    put = av_vsock_put_packet(vsock, &own, NULL, 0);
    if (put == -EAGAIN)
        starve(vsock);
    av_lane_unlock(&vsock->lane);
    return put == -EAGAIN ? 0 : put < 0 ? (int)put : 1;
}

void av_vsock_flush(struct av_vsock *vsock)
{
    av_lane_lock(&vsock->lane);
    flush_rx(vsock);
    vsock->python_first = false;
    if (vsock->python_turn)
        av_lane_wake(&vsock->lane);
    vsock->python_turn = false;
    av_lane_unlock(&vsock->lane);
}
