/* Load on a device through its virtqueues: what `avmm bench` and tests drive it with. */
#ifndef AV_LOAD_H
#define AV_LOAD_H

#include <stdint.h>

#include "vdriver.h"

#define AV_LOAD_QUEUES_MAX 16

/* cdef begin */
/* How long, and how hard; of each queue. depth: requests in flight. Ends after `requests` or
 * duration_ns, whichever comes first; 0: not by that. timeout_ns: after which a device that does
 * not answer is given up. polling: never sleep and never ask for interrupts. data_gpa: room for
 * the requests, data_bytes for each queue, one after the other. */
struct av_load {
    uint32_t depth;
    uint64_t requests;
    uint64_t duration_ns;
    uint64_t timeout_ns;
    uint8_t polling;
    uint64_t data_gpa;
    uint64_t data_bytes;
};

/* Sums over the queues. errors: status bytes that are not OK. mismatches: sectors read that do
 * not hold their stamp. elapsed_ns: of the slowest queue. cpu_ns: of the driver's threads. */
struct av_load_result {
    uint64_t requests;
    uint64_t errors;
    uint64_t mismatches;
    uint64_t elapsed_ns;
    uint64_t cpu_ns;
    uint64_t kicks;
    uint64_t interrupts;
    uint64_t p50_ns;
    uint64_t p99_ns;
};

/* Requests of block_bytes, a multiple of 512, somewhere in the first span_bytes of the disk; at
 * random, or one after the other in each queue's own part. Every sector written begins with its
 * stamp, av_load_stamp(sector). verify: that every sector read does. */
struct av_load_blk {
    uint32_t block_bytes;
    uint64_t span_bytes;
    uint64_t seed;
    uint8_t write;
    uint8_t sequential;
    uint8_t verify;
};

/* Bytes of data_bytes that a queue needs. */
uint64_t av_load_blk_room(const struct av_load *load, const struct av_load_blk *blk);
uint64_t av_load_stamp(uint64_t sector);
/* Put stamps into `bytes` of data that begin with `sector`. */
void av_load_stamp_sectors(uint8_t *data, uint64_t bytes, uint64_t sector);
/* One thread a queue; returns when all have ended. 0, -EINVAL, -ETIMEDOUT the device stopped
 * answering, -EPROTO it broke a ring, or -errno; after any but -EINVAL the drivers are spent. */
int av_load_blk_run(struct av_vdriver *const *drivers, const struct av_gmem *mem, uint32_t queues,
                    const struct av_load *load, const struct av_load_blk *blk,
                    struct av_load_result *out);

/* Frames of frame_bytes, 14 to 1514. socket_fd: -1 to send them to the host. Else a packet socket
 * on the TAP's interface, which they are put into to come from the host; at most `window` of them
 * are on their way, fewer than the TAP's queue holds. */
struct av_load_net {
    uint32_t frame_bytes;
    int socket_fd;
    uint32_t window;
};

/* Bytes of data_bytes that the queue needs. */
uint64_t av_load_net_room(const struct av_load *load, const struct av_load_net *net);
/* Through a device's transmit or receive queue, always polling, for duration_ns. As
 * av_load_blk_run(); no latencies. */
int av_load_net_run(struct av_vdriver *driver, const struct av_gmem *mem,
                    const struct av_load *load, const struct av_load_net *net,
                    struct av_load_result *out);
/* The same through a bare, non-blocking TAP with virtio headers of 12 bytes, by read or write;
 * only `requests` and `elapsed_ns` are measured. 0 or -errno. */
int av_load_tap_run(int tap_fd, const struct av_load *load, const struct av_load_net *net,
                    struct av_load_result *out);

/* One guest of a socket device, which connects to host_port. sends: bytes to the host; 0: it takes
 * what comes, until the host closes. Else connections: so many come and go, some at_once, up to 16.
 * timeout_ns: as in struct av_load. */
struct av_load_vsock {
    uint64_t cid;
    uint32_t host_port;
    uint64_t sends;
    uint64_t connections;
    uint32_t at_once;
    uint64_t timeout_ns;
};

/* Bytes of memory that it needs. */
uint64_t av_load_vsock_room(void);
/* Both drivers of one call_fd, which does not block. In the caller's thread. `requests` are bytes,
 * or connections; no latencies. 0, -EINVAL, -ETIMEDOUT, -EPROTO or -errno. */
int av_load_vsock_run(struct av_vdriver *rx, struct av_vdriver *tx, const struct av_gmem *mem,
                      uint64_t data_gpa, const struct av_load_vsock *load,
                      struct av_load_result *out);
/* cdef end */

#endif
