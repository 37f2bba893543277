#include "net_internal.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

/* Source numbers. */
#define RX_KICK 0u
#define TX_KICK 1u
#define TAP 2u

static struct av_net *of(struct av_lane *lane)
{
    return (struct av_net *)lane;
}

static bool can_receive(const struct av_net *net)
{
    return net->lane.taking && net->link_up;
}

static bool can_transmit(const struct av_net *net)
{
    return net->lane.taking && !net->tx.full;
}

/* Whether chains of the transmit ring are of interest, should some come. */
static bool awaits_chains(const struct av_net *net)
{
    return can_transmit(net) && !av_holds(&net->tx.hold) && !net->tx.throttle.waiting;
}

static int net_run(struct av_lane *lane, uint32_t ready)
{
    struct av_net *net = of(lane);
    uint64_t before = net->stats.tx_packets;
    int received = 0, sent = 0, result;

    if (ready & 1u << RX_KICK)
        av_vring_count_kick(net->rx.ring);
    if (ready & 1u << TX_KICK)
        av_vring_count_kick(net->tx.ring);
    if (ready & 1u << TAP) {
        net->rx.readable = true;
        net->tx.full = false;
    }
    if (can_transmit(net))
        sent = av_net_transmit(net);
    /* What the guest sends, the host's stack often answers before write() returns. Taken along
     * now, the answer saves a wake-up of ours, and the driver one of its two. */
    if (can_receive(net) && (net->rx.readable || net->stats.tx_packets != before))
        received = av_net_receive(net);
    result = received < 0 ? received : sent < 0 ? sent : received | sent;
    if (result != 0 || !av_net_holds_back(net))
        av_net_flush_tx(net);
    return result;
}

/* Whether the TAP takes packets again. A TAP remembers to tell only when it was asked while it
 * was full, so an event may never come by itself. */
static bool tap_has_room(struct av_net *net)
{
    struct pollfd poll_fd = { .fd = net->fd, .events = POLLOUT };

    if (net->end != NULL)
        net->tx.full = !av_cable_has_room(net->end);
    else
        net->tx.full = poll(&poll_fd, 1, 0) == 0;
    return !net->tx.full;
}

static bool net_arm(struct av_lane *lane)
{
    struct av_net *net = of(lane);
    bool more = false;

    if (!lane->taking)
        return false;
    if (net->tx.full)
        more = tap_has_room(net);
    else if (awaits_chains(net))
        more = av_vring_kicks_on(net->tx.ring) != 0;
    /* While the guest has room, the TAP's event goes on with the ring, not a kick. */
    if (can_receive(net) && net->rx.starved)
        more |= av_vring_kicks_on(net->rx.ring) != 0;
    return more;
}

static bool net_pending(struct av_lane *lane)
{
    struct av_net *net = of(lane);

    if (can_receive(net) && net->rx.starved && av_vring_pending(net->rx.ring))
        return true;
    return awaits_chains(net) && av_vring_pending(net->tx.ring);
}

static uint64_t net_taken(const struct av_lane *lane)
{
    const struct av_net *net = (const struct av_net *)lane;

    return av_vring_taken(net->rx.ring) + av_vring_taken(net->tx.ring);
}

static bool net_idle(const struct av_lane *lane)
{
    /* Receive buffers that are held are the ring's affair. */
    return !av_holds(&((const struct av_net *)lane)->tx.hold);
}

static void net_hold(struct av_lane *lane)
{
    av_throttle_leave(&of(lane)->rx.throttle);
    av_throttle_leave(&of(lane)->tx.throttle);
}

static const struct av_lane_ops lane_ops = {
    .run = net_run,
    .arm = net_arm,
    .pending = net_pending,
    .taken = net_taken,
    .idle = net_idle,
    .hold = net_hold,
};

static int set_up(struct av_net *net, struct av_home *home, int fd)
{
    /* A mapping of its own, so that it costs memory only where packets reach it. */
    void *staging = mmap(NULL, AV_NET_PACKET_MAX_BYTES, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int result;

    if (staging == MAP_FAILED)
        return errno;
    net->rx.staging = staging;
    net->tx.timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    if (net->tx.timer_fd < 0)
        return errno;
    result = av_lane_init(&net->lane, home, &lane_ops, 2);
    if (result < 0)
        return -result;
    av_lane_add_source(&net->lane, fd, EPOLLIN | EPOLLOUT);
    av_lane_add_source(&net->lane, net->tx.timer_fd, EPOLLIN);
    return 0;
}

struct av_net *av_net_create(struct av_home *home, int fd, struct av_cable_end *end,
                             struct av_vring *rx, struct av_vring *tx, int *error)
{
    struct av_net *net = calloc(1, sizeof(*net));

    if (net == NULL) {
        *error = ENOMEM;
        return NULL;
    }
    net->fd = fd;
    net->end = end;
    net->rx.ring = rx;
    net->tx.ring = tx;
    net->tx.timer_fd = -1;
    av_hold_init(&net->tx.hold);
    av_throttle_init(&net->rx.throttle);
    av_throttle_init(&net->tx.throttle);
    net->rx.readable = net->link_up = true;
    *error = set_up(net, home, fd);
    if (*error != 0) {
        av_net_destroy(net);
        return NULL;
    }
    return net;
}

void av_net_destroy(struct av_net *net)
{
    if (net == NULL)
        return;
    av_lane_fini(&net->lane);
    av_throttle_fini(&net->rx.throttle);
    av_throttle_fini(&net->tx.throttle);
    if (net->tx.timer_fd >= 0)
        close(net->tx.timer_fd);
    if (net->rx.staging != NULL)
        munmap(net->rx.staging, AV_NET_PACKET_MAX_BYTES);
    free(net);
}

struct av_lane *av_net_lane(struct av_net *net)
{
    return &net->lane;
}

void av_net_start(struct av_net *net, int mergeable, uint32_t frame_max_bytes, uint32_t mtu)
{
    net->rx.mergeable = mergeable != 0;
    net->rx.packet_max = AV_NET_HEADER_BYTES + frame_max_bytes;
    net->rx.guess = AV_NET_HEADER_BYTES;
    net->rx.plain_max = mtu != 0 ? AV_NET_HEADER_BYTES + AV_NET_ETHER_BYTES + mtu : UINT32_MAX;
}

void av_net_stop(struct av_net *net)
{
    struct av_net_rx *rx = &net->rx;

    /* They are not lost to a driver whose ring goes on where it stands. */
    for (; rx->held_end != rx->first_held; rx->held_end--)
        av_vring_unpop(rx->ring);
    rx->first_held = rx->held_end = 0;
    rx->first_iov = rx->iov_end = 0;
    rx->held_bytes = rx->staged = 0;
    rx->starved = false;
}

void av_net_lose_link(struct av_net *net, int error)
{
    net->error = error;
    net->link_up = false;
    av_lane_news(&net->lane);
}

void av_net_set_link(struct av_net *net, int up)
{
    av_lane_lock(&net->lane);
    net->link_up = up != 0;
    /* Its events came to nothing meanwhile. */
    net->rx.readable = true;
    av_lane_wake(&net->lane);
    av_lane_unlock(&net->lane);
}

void av_net_set_filter(struct av_net *net, const struct av_net_filter *filter)
{
    av_lane_lock(&net->lane);
    net->rx.filtered = filter != NULL;
    if (filter != NULL)
        net->rx.filter = *filter;
    av_lane_unlock(&net->lane);
}

int av_net_limit(struct av_net *net, struct av_limiter *rx, struct av_limiter *tx)
{
    int result;

    av_lane_lock(&net->lane);
    result = av_throttle_attach(&net->rx.throttle, &net->lane, rx);
    if (result == 0)
        result = av_throttle_attach(&net->tx.throttle, &net->lane, tx);
    av_lane_unlock(&net->lane);
    return result;
}

void av_net_set_offloads(struct av_net *net, uint32_t offloads)
{
    av_lane_lock(&net->lane);
    net->rx.offloads = offloads;
    av_lane_unlock(&net->lane);
}

int av_net_take_error(struct av_net *net)
{
    int error;

    av_lane_lock(&net->lane);
    error = net->error;
    net->error = 0;
    av_lane_unlock(&net->lane);
    return error;
}

void av_net_statistics(struct av_net *net, struct av_net_stats *out)
{
    av_lane_lock(&net->lane);
    *out = net->stats;
    out->rx_throttled = net->rx.throttle.waits;
    out->tx_throttled = net->tx.throttle.waits;
    av_lane_unlock(&net->lane);
}
