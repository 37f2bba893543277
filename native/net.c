#include "net.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define HEADER_BYTES 12u
#define NUM_BUFFERS_AT 10u
#define PACKET_MAX_BYTES (HEADER_BYTES + 65536u + 64u)
#define IOV_MAX_COUNT 1024u /* what readv takes */
#define CHAIN_IOV_MAX 256u
#define HELD_MAX 64u

/* A receive buffer taken from the ring and not filled yet. */
struct held {
    uint16_t head;
    uint16_t iov_count;
    uint32_t bytes;
};

struct av_net {
    int fd;
    bool mergeable;
    uint32_t packet_max; /* header included */
    struct av_vring *rx;
    struct av_vring *tx;
    /* Buffers held are contiguous: held[first_held..held_end) own iov[first_iov..iov_end). */
    uint32_t first_held, held_end;
    uint32_t first_iov, iov_end;
    uint32_t held_bytes;
    uint32_t staged; /* bytes of a packet that waits in `staging` for buffers; 0: none */
    struct av_net_stats stats;
    struct held held[HELD_MAX];
    struct iovec iov[IOV_MAX_COUNT];
    uint8_t staging[PACKET_MAX_BYTES];
};

struct av_net *av_net_create(int fd, struct av_vring *rx, struct av_vring *tx)
{
    struct av_net *net = calloc(1, sizeof(*net));

    if (net != NULL) {
        net->fd = fd;
        net->rx = rx;
        net->tx = tx;
    }
    return net;
}

void av_net_destroy(struct av_net *net)
{
    free(net);
}

void av_net_start(struct av_net *net, int mergeable, uint32_t frame_max_bytes)
{
    net->mergeable = mergeable != 0;
    net->packet_max = HEADER_BYTES + frame_max_bytes;
    if (net->packet_max > PACKET_MAX_BYTES)
        net->packet_max = PACKET_MAX_BYTES;
}

void av_net_stop(struct av_net *net)
{
    net->first_held = net->held_end = 0;
    net->first_iov = net->iov_end = 0;
    net->held_bytes = 0;
    net->staged = 0;
}

void av_net_statistics(const struct av_net *net, struct av_net_stats *out)
{
    *out = net->stats;
}

static void compact(struct av_net *net)
{
    uint32_t held = net->held_end - net->first_held, iov = net->iov_end - net->first_iov;

    memmove(net->held, &net->held[net->first_held], held * sizeof(net->held[0]));
    memmove(net->iov, &net->iov[net->first_iov], iov * sizeof(net->iov[0]));
    net->first_held = net->first_iov = 0;
    net->held_end = held;
    net->iov_end = iov;
}

/* Whether no more buffers can be held, however small they are. */
static bool hold_full(const struct av_net *net)
{
    return net->held_end == HELD_MAX || net->iov_end + CHAIN_IOV_MAX > IOV_MAX_COUNT;
}

/* Hold buffers for one packet of the largest kind, if the guest has that many; 0 or -EPROTO. */
static int gather(struct av_net *net)
{
    if (net->held_bytes >= net->packet_max || (!net->mergeable && net->held_bytes != 0))
        return 0;
    compact(net);
    while (net->held_bytes < net->packet_max && !hold_full(net)) {
        struct av_chain chain;
        int result = av_vring_pop(net->rx, &chain, &net->iov[net->iov_end], CHAIN_IOV_MAX);

        if (result <= 0)
            return result;
        if (chain.readable != 0 || chain.writable_bytes < HEADER_BYTES) {
            av_vring_fail(net->rx, AV_FAULT_REQUEST);
            return -EPROTO;
        }
        net->held[net->held_end++] = (struct held){
            .head = chain.head, .iov_count = chain.writable, .bytes = chain.writable_bytes
        };
        net->iov_end += chain.writable;
        net->held_bytes += chain.writable_bytes;
        if (!net->mergeable)
            break;
    }
    return 0;
}

/* Write into the buffers held, from `offset` on. */
static void scatter(struct av_net *net, uint32_t offset, const uint8_t *from, uint32_t count)
{
    for (uint32_t i = net->first_iov; count != 0; i++) {
        uint32_t length = (uint32_t)net->iov[i].iov_len, piece;

        if (offset >= length) {
            offset -= length;
            continue;
        }
        piece = length - offset < count ? length - offset : count;
        memcpy((uint8_t *)net->iov[i].iov_base + offset, from, piece);
        from += piece;
        count -= piece;
        offset = 0;
    }
}

/* Give the guest the packet of `bytes` that lies at the front of the buffers held. */
static void deliver(struct av_net *net, uint32_t bytes)
{
    uint8_t num_buffers[2];
    uint32_t count = 0, left = bytes, room = 0;

    while (room < bytes)
        room += net->held[net->first_held + count++].bytes;
    /* The TAP knows nothing of merged buffers, so this field is ours to fill (5.1.6.4). */
    num_buffers[0] = (uint8_t)count;
    num_buffers[1] = (uint8_t)(count >> 8);
    scatter(net, NUM_BUFFERS_AT, num_buffers, sizeof(num_buffers));
    for (; count != 0; count--) {
        const struct held *held = &net->held[net->first_held++];
        uint32_t used = left < held->bytes ? left : held->bytes;

        av_vring_push(net->rx, held->head, used);
        net->first_iov += held->iov_count;
        net->held_bytes -= held->bytes;
        left -= used;
    }
    net->stats.rx_packets++;
    net->stats.rx_bytes += bytes - HEADER_BYTES;
}

/* One packet into our own buffer, since the guest's might be too small; as receive(). */
static int receive_staged(struct av_net *net)
{
    if (net->staged == 0) {
        ssize_t got = read(net->fd, net->staging, sizeof(net->staging));
        if (got <= 0)
            return got == 0 ? -EIO : -errno;
        if (got < (ssize_t)HEADER_BYTES)
            return 1;
        net->staged = (uint32_t)got;
    }
    if (net->staged > net->held_bytes) {
        if (net->mergeable && !hold_full(net))
            return 0;
        net->stats.rx_dropped++;
        net->staged = 0;
        return 1;
    }
    scatter(net, 0, net->staging, net->staged);
    net->stats.rx_copied++;
    deliver(net, net->staged);
    net->staged = 0;
    return 1;
}

/* One packet; 1 done, 0 the guest has no room for it, -EAGAIN the TAP is empty, or -errno. */
static int receive(struct av_net *net)
{
    int result = gather(net);
    ssize_t got;

    if (result < 0)
        return result;
    if (net->held_bytes == 0)
        return 0;
    if (net->staged != 0 || net->held_bytes < net->packet_max)
        return receive_staged(net);
    got = readv(net->fd, &net->iov[net->first_iov], (int)(net->iov_end - net->first_iov));
    if (got <= 0)
        return got == 0 ? -EIO : -errno;
    if (got >= (ssize_t)HEADER_BYTES)
        deliver(net, (uint32_t)got);
    return 1;
}

int av_net_rx(struct av_net *net, int kick_fd, uint32_t budget)
{
    int result = 1;

    av_vring_take_kick(net->rx, kick_fd);
    av_vring_kicks_off(net->rx);
    for (;;) {
        if (budget-- == 0)
            break;
        result = receive(net);
        /* Out of buffers: only now are kicks wanted, and some may have come meanwhile. */
        if (result == 0 && !av_vring_kicks_on(net->rx))
            break;
        if (result < 0)
            break;
    }
    av_vring_flush(net->rx);
    if (result > 0)
        return AV_NET_MORE;
    if (result == 0)
        return AV_NET_NO_BUFFERS;
    return result == -EAGAIN ? 0 : result;
}

/* Send one chain; 0, or -EAGAIN when the TAP is full. */
static int transmit(struct av_net *net, const struct av_chain *chain)
{
    ssize_t sent = -1;

    if (chain->readable_bytes > HEADER_BYTES) {
        sent = writev(net->fd, chain->iov, chain->readable);
        if (sent < 0 && errno == EAGAIN)
            return -EAGAIN;
    }
    if (sent < 0) {
        /* The header is the guest's, and the TAP refuses what makes no sense; or the link is
         * down. Either way a real wire would have lost it. */
        net->stats.tx_dropped++;
    } else {
        net->stats.tx_packets++;
        net->stats.tx_bytes += (uint64_t)sent - HEADER_BYTES;
    }
    av_vring_push(net->tx, chain->head, 0);
    return 0;
}

int av_net_tx(struct av_net *net, int kick_fd, uint32_t budget)
{
    struct iovec iov[CHAIN_IOV_MAX];
    struct av_chain chain;
    int result = 0, state = 0;

    av_vring_take_kick(net->tx, kick_fd);
    do {
        av_vring_kicks_off(net->tx);
        while ((result = av_vring_pop(net->tx, &chain, iov, CHAIN_IOV_MAX)) > 0) {
            if (budget == 0)
                state = AV_NET_MORE;
            else if (transmit(net, &chain) < 0)
                state = AV_NET_TAP_FULL;
            if (state != 0) {
                av_vring_unpop(net->tx);
                break;
            }
            budget--;
        }
    } while (result == 0 && av_vring_kicks_on(net->tx));
    av_vring_flush(net->tx);
    return result < 0 ? result : state;
}
