/* From the TAP to the guest.
 *
 * How large a packet is shows only when it is read, and with merged buffers it may need forty of
 * the guest's. To take them all for each packet costs more than a small packet itself, so we take
 * what the last packet needed and put memory of our own behind. Packets come in runs of a kind:
 * the part that lands there and has to be copied is rare. */
#include "net_internal.h"

#include <errno.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "offload.h"

#define BUDGET_PACKETS 128u
/* How often the driver sees what came, so that it works while we read on. */
#define FLUSH_EVERY 32u

static void compact(struct av_net_rx *rx)
{
    uint32_t held = rx->held_end - rx->first_held, iov = rx->iov_end - rx->first_iov;

    memmove(rx->held, &rx->held[rx->first_held], held * sizeof(rx->held[0]));
    memmove(rx->iov, &rx->iov[rx->first_iov], iov * sizeof(rx->iov[0]));
    rx->first_held = rx->first_iov = 0;
    rx->held_end = held;
    rx->iov_end = iov;
}

/* Whether no more buffers can be held, however small they are. One place is for `staging`. */
static bool hold_full(const struct av_net_rx *rx)
{
    return rx->held_end == AV_NET_HELD_MAX || rx->iov_end + AV_NET_CHAIN_IOV_MAX >= AV_NET_IOV_MAX;
}

/* Hold buffers for a packet of `bytes`, if the guest has that many; 0 or -EPROTO. */
static int gather(struct av_net_rx *rx, uint32_t bytes)
{
    if (rx->held_bytes >= bytes || (!rx->mergeable && rx->held_bytes != 0))
        return 0;
    compact(rx);
    while (rx->held_bytes < bytes && !hold_full(rx)) {
        struct av_chain chain;
        int result = av_vring_pop(rx->ring, &chain, &rx->iov[rx->iov_end], AV_NET_CHAIN_IOV_MAX);

        if (result <= 0)
            return result;
        if (chain.readable != 0 || chain.writable_bytes < AV_NET_HEADER_BYTES) {
            av_vring_fail(rx->ring, AV_FAULT_REQUEST);
            return -EPROTO;
        }
        rx->held[rx->held_end++] = (struct av_net_held){
            .head = chain.head, .iov_count = chain.writable, .bytes = chain.writable_bytes
        };
        rx->iov_end += chain.writable;
        rx->held_bytes += chain.writable_bytes;
        if (!rx->mergeable)
            break;
    }
    return 0;
}

/* Write into the buffers held, from `offset` on. */
static void scatter(struct av_net_rx *rx, uint32_t offset, const uint8_t *from, uint32_t count)
{
    for (uint32_t i = rx->first_iov; count != 0; i++) {
        uint32_t length = (uint32_t)rx->iov[i].iov_len, piece;

        if (offset >= length) {
            offset -= length;
            continue;
        }
        piece = length - offset < count ? length - offset : count;
        memcpy((uint8_t *)rx->iov[i].iov_base + offset, from, piece);
        from += piece;
        count -= piece;
        offset = 0;
    }
}

/* Give the guest the packet of `bytes` that lies at the front of the buffers held. */
static void deliver(struct av_net *net, uint32_t bytes)
{
    struct av_net_rx *rx = &net->rx;
    uint8_t num_buffers[2];
    uint32_t count = 0, left = bytes, room = 0;

    while (room < bytes)
        room += rx->held[rx->first_held + count++].bytes;
    /* The TAP knows nothing of merged buffers, so this field is ours to fill (5.1.6.4). */
    num_buffers[0] = (uint8_t)count;
    num_buffers[1] = (uint8_t)(count >> 8);
    scatter(rx, AV_NET_NUM_BUFFERS_AT, num_buffers, sizeof(num_buffers));
    for (; count != 0; count--) {
        const struct av_net_held *held = &rx->held[rx->first_held++];
        uint32_t used = left < held->bytes ? left : held->bytes;

        av_vring_push(rx->ring, held->head, used);
        rx->first_iov += held->iov_count;
        rx->held_bytes -= held->bytes;
        left -= used;
    }
    net->stats.rx_packets++;
    net->stats.rx_bytes += bytes - AV_NET_HEADER_BYTES;
    av_throttle_charge(&net->rx.throttle, 1, bytes - AV_NET_HEADER_BYTES);
}

/* The first AV_NET_LOOK_BYTES of the packet of `bytes` that was just read, zeroes behind its end:
 * where they lie, or gathered in `copy`. */
static const uint8_t *look(const struct av_net_rx *rx, uint32_t bytes, uint8_t *copy)
{
    const struct iovec *iov = &rx->iov[rx->first_iov];

    if (iov->iov_len >= AV_NET_LOOK_BYTES && bytes >= AV_NET_LOOK_BYTES)
        return iov->iov_base;
    memset(copy, 0, AV_NET_LOOK_BYTES);
    /* In pieces; the last is in `staging`, which is large enough for all. */
    for (uint32_t at = 0, from = 0; at < AV_NET_LOOK_BYTES && at < bytes; at++, from++) {
        while (from == iov->iov_len) {
            iov++;
            from = 0;
        }
        copy[at] = ((const uint8_t *)iov->iov_base)[from];
    }
    return copy;
}

/* Whether the packet is no larger than the MTU allows. */
static bool fits_mtu(const struct av_net_rx *rx, const uint8_t *packet, uint32_t bytes)
{
    const uint8_t *type = packet + AV_NET_HEADER_BYTES + AV_NET_ETHER_BYTES - 2;

    if (bytes <= rx->plain_max || (packet[1] & ~AV_NET_GSO_ECN) != 0)
        return true;
    /* A tag makes the Ethernet header longer. */
    return type[0] == 0x81 && type[1] == 0x00 && bytes <= rx->plain_max + AV_NET_VLAN_BYTES;
}

/* Whether the packet of `bytes` that was just read is one for this driver (5.1.4.1, 5.1.6.4.1), and
 * is not filtered out. Clears flags in its header that the driver does not know. */
static bool passes(struct av_net *net, uint32_t bytes)
{
    struct av_net_rx *rx = &net->rx;
    uint8_t copy[AV_NET_LOOK_BYTES], flags;
    const uint8_t *packet = look(rx, bytes, copy);

    if (!av_offload_takes(packet, rx->offloads, &flags) || !fits_mtu(rx, packet, bytes)) {
        net->stats.rx_dropped++;
        return false;
    }
    if (rx->filtered && !av_net_wanted(&rx->filter, packet + AV_NET_HEADER_BYTES)) {
        net->stats.rx_filtered++;
        return false;
    }
    if (flags != packet[0])
        scatter(rx, 0, &flags, sizeof(flags));
    return true;
}

/* Go on with a packet that is larger than the buffers held when it was read; as receive_one(). */
static int finish_staged(struct av_net *net)
{
    struct av_net_rx *rx = &net->rx;
    int result = gather(rx, rx->staged);

    if (result < 0)
        return result;
    if (rx->held_bytes >= rx->staged) {
        scatter(rx, rx->staged_from, rx->staging, rx->staged - rx->staged_from);
        net->stats.rx_copied++;
        deliver(net, rx->staged);
    } else if (rx->mergeable && !hold_full(rx)) {
        return 0;
    } else {
        net->stats.rx_dropped++;
    }
    rx->staged = 0;
    return 1;
}

/* Read a packet into the buffers held and, where it might be larger, `staging`. */
static ssize_t read_packet(struct av_net *net)
{
    struct av_net_rx *rx = &net->rx;
    struct iovec *iov = &rx->iov[rx->first_iov];
    uint32_t count = rx->iov_end - rx->first_iov;

    rx->is_staged = rx->held_bytes <= rx->packet_max;
    rx->iov[rx->iov_end] =
        (struct iovec){ .iov_base = rx->staging, .iov_len = AV_NET_PACKET_MAX_BYTES };
    if (rx->is_staged)
        count++;
    if (net->end != NULL)
        return av_cable_readv(net->end, iov, count);
    return count == 1 ? read(net->fd, iov->iov_base, iov->iov_len)
                      : readv(net->fd, iov, (int)count);
}

/* One packet; 1 done, 0 the guest has no room for it, -EAGAIN the TAP is empty, -EBUSY it has to
 * wait for the limiter, or -errno. */
static int receive_one(struct av_net *net)
{
    struct av_net_rx *rx = &net->rx;
    ssize_t got;
    int result;

    if (rx->staged != 0)
        return finish_staged(net);
    result = gather(rx, rx->guess);
    if (result < 0)
        return result;
    if (rx->held_bytes == 0)
        return 0;
    if (!av_throttle_admits(&rx->throttle, NULL))
        return -EBUSY;
    got = read_packet(net);
    if (got <= 0)
        return got == 0 ? -EIO : -errno;
    if (got < (ssize_t)AV_NET_HEADER_BYTES)
        return 1;
    if (!rx->is_staged && (uint32_t)got == rx->held_bytes) {
        /* It was cut, for somebody has raised the MTU. */
        rx->packet_max = AV_NET_PACKET_MAX_BYTES;
        net->stats.rx_dropped++;
        return 1;
    }
    if (!passes(net, (uint32_t)got))
        return 1;
    rx->guess = (uint32_t)got;
    if ((uint32_t)got > rx->held_bytes) {
        rx->staged = (uint32_t)got;
        rx->staged_from = rx->held_bytes;
        return finish_staged(net);
    }
    deliver(net, (uint32_t)got);
    return 1;
}

int av_net_receive(struct av_net *net)
{
    struct av_net_rx *rx = &net->rx;
    uint32_t left = BUDGET_PACKETS;
    int result = 1;

    av_vring_kicks_off(rx->ring);
    rx->starved = false;
    av_throttle_begin(&rx->throttle);
    while (result > 0 && left != 0) {
        result = receive_one(net);
        if (--left % FLUSH_EVERY == 0)
            av_vring_flush(rx->ring);
    }
    av_throttle_end(&rx->throttle);
    av_vring_flush(rx->ring);
    if (result >= 0) {
        rx->starved = result == 0;
        return result;
    }
    if (result == -EBUSY)
        return 0;
    rx->readable = false;
    if (result == -EPROTO)
        return result;
    if (result != -EAGAIN)
        av_net_lose_link(net, -result);
    return 0;
}
