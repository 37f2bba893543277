/* The network device's datapath: a pair of rings, and a TAP queue or the end of a cable (virtio 1.3
 * section 5.1.6). What is said of a TAP holds for a cable. A device has one of these a queue pair, so pairs share nothing and need no lock. */
#ifndef AV_NET_H
#define AV_NET_H

#include <stdint.h>

#include "cable.h"
#include "home.h"
#include "throttle.h"
#include "vring.h"

/* cdef begin */
struct av_net_stats {
    uint64_t rx_packets;
    uint64_t rx_bytes;   /* headers not counted */
    uint64_t rx_dropped; /* larger than the buffers the guest has for one packet, or not what its
                            driver has negotiated */
    uint64_t rx_filtered; /* not for the guest, by what it asked for */
    uint64_t rx_copied;  /* larger than the buffers taken for them, so in part by way of ours */
    uint64_t tx_packets;
    uint64_t tx_bytes;
    uint64_t tx_dropped; /* refused by the TAP, shorter than a header, or without a cable */
    uint64_t rx_throttled; /* times that packets had to wait for the limiter */
    uint64_t tx_throttled;
};

/* What the guest wants to receive (section 5.1.6.5.1 to 3). `mac` counts as one of its addresses. */
struct av_net_filter {
    uint8_t mac[6];
    uint8_t promisc;
    uint8_t allmulti;
    uint8_t alluni;
    uint8_t nomulti;
    uint8_t nouni;
    uint8_t nobcast;
    uint8_t by_vlan; /* tagged frames only of the networks in `vlan` */
    uint32_t addresses;
    uint8_t address[64][6];
    uint64_t vlan[64]; /* a bit for each number */
};

/* All are borrowed. fd: a non-blocking TAP queue whose packets begin with the 12 bytes of struct
 * virtio_net_hdr_v1; or what the end of a cable, which is there in the TAP's place, is watched by.
 * end: that end, or NULL. NULL: *error is the errno. */
struct av_net;
struct av_net *av_net_create(struct av_home *home, int fd, struct av_cable_end *end,
                             struct av_vring *rx, struct av_vring *tx, int *error);
void av_net_destroy(struct av_net *net); /* its lane is at rest */
/* Kick 0: the receive ring's, 1: the transmit ring's. News: the TAP fails, see below. */
struct av_lane *av_net_lane(struct av_net *net);
/* At rest: what was negotiated. mergeable: MRG_RXBUF. frame_max_bytes: the largest frame that is
 * likely to come, without the header. mtu: what lies behind the Ethernet header of a frame that is
 * not to be segmented is no larger (section 5.1.4.1); 0: it may be. */
void av_net_start(struct av_net *net, int mergeable, uint32_t frame_max_bytes, uint32_t mtu);
/* What the driver takes, as TUNSETOFFLOAD has it: nothing at first. Packets that need more, which
 * may have waited since it took more, are dropped. */
void av_net_set_offloads(struct av_net *net, uint32_t offloads);
/* At rest: forget buffers that were taken and not used; the driver resets the receive ring. */
void av_net_stop(struct av_net *net);
/* Whether the cable is in. Without it nothing is received, and what the guest sends is lost. */
void av_net_set_link(struct av_net *net, int up);
/* Drop what does not pass, copied; NULL: all passes. */
void av_net_set_filter(struct av_net *net, const struct av_net_filter *filter);
/* Obey these from now on; borrowed. Nothing when it does already. 0 or -errno. What the guest
 * receives counts, and all that it sends, dropped or not; bytes without headers. */
int av_net_limit(struct av_net *net, struct av_limiter *rx, struct av_limiter *tx);
/* The errno with which the TAP refused to be read since the last call, 0: none. Nothing is
 * received after one, until av_net_set_link(). */
int av_net_take_error(struct av_net *net);
void av_net_statistics(struct av_net *net, struct av_net_stats *out);
/* cdef end */

#endif
