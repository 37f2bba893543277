/* From the guest to the TAP: one write() a packet, since a TAP takes no more at a time.
 *
 * io_uring would submit a batch of them with one system call. Measured with 64-byte packets on a
 * bare TAP it sends 2.55 million a second with a registered file, 2.40 without, write() 2.47 and
 * writev() of two pieces 2.26: what a packet costs is the kernel's network stack, not the call. That
 * is not worth packets in flight, which every rest, reset and pause would have to wait for. */
#include "net_internal.h"

#include <errno.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define BUDGET_PACKETS 128u
/* How often a driver that looks sees what went, so that it can use the room while we go on; for
 * one interrupt all the same. */
#define SHOW_EVERY 32u

static ssize_t send_packet(struct av_net *net, const struct av_chain *chain)
{
    if (net->end != NULL)
        return av_cable_writev(net->end, chain->iov, chain->readable);
    return chain->readable == 1 ? write(net->fd, chain->iov->iov_base, chain->iov->iov_len)
                                : writev(net->fd, chain->iov, chain->readable);
}

/* Send one chain; 0, or -EAGAIN when the TAP is full. */
static int send_one(struct av_net *net, const struct av_chain *chain)
{
    ssize_t sent = -1;

    if (chain->readable_bytes > AV_NET_HEADER_BYTES && net->link_up) {
        sent = send_packet(net, chain);
        if (sent < 0 && errno == EAGAIN)
            return -EAGAIN;
        /* Somebody removed the TAP. Nothing is read while the guest offers no buffers, so this may
         * be the first to tell. */
        if (sent < 0 && errno == EBADFD)
            av_net_lose_link(net, EBADFD);
    }
    if (sent < 0) {
        /* The header is the guest's, and the TAP refuses what makes no sense; or there is no
         * cable. Either way a real wire would have lost it. */
        net->stats.tx_dropped++;
        av_throttle_charge(&net->tx.throttle, 1, 0);
    } else {
        net->stats.tx_packets++;
        net->stats.tx_bytes += (uint64_t)sent - AV_NET_HEADER_BYTES;
        av_throttle_charge(&net->tx.throttle, 1, (uint64_t)sent - AV_NET_HEADER_BYTES);
    }
    av_vring_push(net->tx.ring, chain->head, 0);
    net->tx.done++;
    return 0;
}

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

bool av_net_holds_back(struct av_net *net)
{
    struct av_net_tx *tx = &net->tx;
    uint64_t before_ns = tx->hold.until_ns, until_ns;
    struct itimerspec at = { 0 };
    bool due;

    if (tx->done == 0)
        return false;
    due = net->lane.taking && !tx->full && !tx->throttle.waiting && av_vring_interrupt_due(tx->ring);
    until_ns = av_hold_until(&tx->hold, tx->done - tx->hold.count, due, now_ns());
    if (until_ns == 0 || until_ns == before_ns)
        return until_ns != 0;
    at.it_value.tv_sec = (time_t)(until_ns / 1000000000u);
    at.it_value.tv_nsec = (long)(until_ns % 1000000000u);
    /* Without a timer to rely on nobody may be made to wait. */
    return timerfd_settime(tx->timer_fd, TFD_TIMER_ABSTIME, &at, NULL) == 0;
}

void av_net_flush_tx(struct av_net *net)
{
    net->tx.done = 0;
    net->tx.hold.count = 0;
    av_vring_flush(net->tx.ring);
}

/* As av_vring_pop(). */
static int take(struct av_net *net, struct av_chain *chain, struct iovec *iov)
{
    if (!av_throttle_admits(&net->tx.throttle, net->tx.ring))
        return 0;
    return av_vring_pop(net->tx.ring, chain, iov, AV_NET_CHAIN_IOV_MAX);
}

int av_net_transmit(struct av_net *net)
{
    struct av_vring *ring = net->tx.ring;
    struct iovec iov[AV_NET_CHAIN_IOV_MAX];
    struct av_chain chain;
    uint32_t left = BUDGET_PACKETS;
    int result = 0;

    av_vring_kicks_off(ring);
    av_throttle_begin(&net->tx.throttle);
    while (left != 0 && (result = take(net, &chain, iov)) > 0) {
        if (send_one(net, &chain) < 0) {
            av_vring_unpop(ring);
            net->tx.full = true;
            result = 0;
            break;
        }
        if (--left % SHOW_EVERY == 0)
            av_vring_show(ring);
    }
    av_throttle_end(&net->tx.throttle);
    av_vring_show(ring);
    return result;
}
