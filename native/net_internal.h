/* What net.c (a pair and its lane), net_rx.c and net_tx.c share. */
#ifndef AV_NET_INTERNAL_H
#define AV_NET_INTERNAL_H

#include <stdbool.h>
#include <stdint.h>

#include "hold.h"
#include "lane.h"
#include "net.h"
#include "throttle.h"

#define AV_NET_HEADER_BYTES 12u
#define AV_NET_NUM_BUFFERS_AT 10u
#define AV_NET_ETHER_BYTES 14u
#define AV_NET_VLAN_BYTES 4u
#define AV_NET_GSO_ECN 0x80u
#define AV_NET_FILTER_BYTES 16u /* of a frame, what a filter looks at: addresses and VLAN tag */
#define AV_NET_LOOK_BYTES (AV_NET_HEADER_BYTES + AV_NET_FILTER_BYTES)
#define AV_NET_PACKET_MAX_BYTES (AV_NET_HEADER_BYTES + 65536u + 64u)
#define AV_NET_CHAIN_IOV_MAX 256u
#define AV_NET_IOV_MAX 1024u /* what readv takes */
#define AV_NET_HELD_MAX 64u

/* A receive buffer taken from the ring and not filled yet. */
struct av_net_held {
    uint16_t head;
    uint16_t iov_count;
    uint32_t bytes;
};

struct av_net_rx {
    struct av_vring *ring;
    struct av_throttle throttle;
    bool mergeable;
    bool readable; /* the TAP may hold packets: it was not seen empty since its last event */
    bool is_staged; /* `staging` is behind the buffers held */
    bool starved;  /* the guest has no room: its kick goes on, not the TAP */
    /* Buffers held are contiguous: held[first_held..held_end) own iov[first_iov..iov_end). */
    uint32_t first_held, held_end;
    uint32_t first_iov, iov_end;
    uint32_t held_bytes;
    uint32_t guess;  /* bytes that the next packet may have, from the last one */
    uint32_t packet_max; /* bytes beyond which none is expected */
    /* A packet of `staged` bytes that waits for buffers: what is beyond its first `staged_from`
     * bytes, which lie in those held, is in `staging`. 0: none. */
    uint32_t staged, staged_from;
    struct av_net_held held[AV_NET_HELD_MAX];
    struct iovec iov[AV_NET_IOV_MAX];
    uint8_t *staging;
    uint32_t offloads;   /* that the driver takes */
    uint32_t plain_max;  /* bytes of the largest packet that is not to be segmented */
    bool filtered;
    struct av_net_filter filter;
};

struct av_net_tx {
    struct av_vring *ring;
    struct av_throttle throttle;
    struct av_hold hold;
    int timer_fd; /* ends a hold */
    uint32_t done; /* chains shown since the ring was flushed */
    bool full; /* the TAP takes no more for now */
};

struct av_net {
    struct av_lane lane; /* first: its home gives it back */
    int fd;
    struct av_cable_end *end; /* in the place of a TAP; NULL: fd is one */
    bool link_up;
    int error;
    struct av_net_rx rx;
    struct av_net_tx tx;
    struct av_net_stats stats;
};

/* Whether a frame that begins with these bytes is for the guest. */
bool av_net_wanted(const struct av_net_filter *filter, const uint8_t *frame);
/* The TAP failed: the cable is out until it is plugged in again. */
void av_net_lose_link(struct av_net *net, int error);
/* Move packets, a bounded number. 1 more to do, 0, or -EPROTO. Transmitting shows the driver what
 * went, and leaves its interrupt to av_net_flush_tx(). */
int av_net_receive(struct av_net *net);
int av_net_transmit(struct av_net *net);
/* Whether that interrupt may wait a moment; then the timer is set. */
bool av_net_holds_back(struct av_net *net);
void av_net_flush_tx(struct av_net *net);

#endif
