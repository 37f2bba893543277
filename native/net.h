/* The network device's datapath: two rings and a TAP (virtio 1.3 section 5.1.6). */
#ifndef AV_NET_H
#define AV_NET_H

#include <stdint.h>

#include "vring.h"

/* cdef begin */
/* What a call leaves behind; 0: all is done until the next event. */
enum av_net_state {
    AV_NET_MORE = 1,       /* the budget is used up: call again */
    AV_NET_NO_BUFFERS = 2, /* the guest has no room: wait for its kick, not for the TAP */
    AV_NET_TAP_FULL = 4    /* the TAP takes no more now: wait until it is writable */
};

struct av_net_stats {
    uint64_t rx_packets;
    uint64_t rx_bytes;   /* headers not counted */
    uint64_t rx_dropped; /* larger than the buffers of a guest that does not merge them */
    uint64_t rx_copied;  /* by way of a buffer of our own, for want of the guest's */
    uint64_t tx_packets;
    uint64_t tx_bytes;
    uint64_t tx_dropped; /* refused by the TAP, or shorter than a header */
};

/* One thread uses a device. fd: a non-blocking TAP whose packets begin with the 12 bytes of
 * struct virtio_net_hdr_v1, borrowed; so are the rings. */
struct av_net;
struct av_net *av_net_create(int fd, struct av_vring *rx, struct av_vring *tx); /* NULL: errno */
void av_net_destroy(struct av_net *net);
/* The driver is ready. mergeable: MRG_RXBUF was negotiated. frame_max_bytes: the largest frame
 * that can come, without the header. */
void av_net_start(struct av_net *net, int mergeable, uint32_t frame_max_bytes);
/* Forget buffers that were taken and not used: the driver resets the ring. */
void av_net_stop(struct av_net *net);
/* From the TAP to the guest, and back; at most `budget` packets. Both drain kick_fd and return
 * av_net_state bits, -EPROTO, or -errno of the TAP. */
int av_net_rx(struct av_net *net, int kick_fd, uint32_t budget);
int av_net_tx(struct av_net *net, int kick_fd, uint32_t budget);
void av_net_statistics(const struct av_net *net, struct av_net_stats *out);
/* cdef end */

#endif
