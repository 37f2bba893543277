/* The socket device (virtio 1.3 section 5.10): packets between its rings, unix sockets and Python.
 *
 * A connection between a program of the guest and a unix socket is spliced: payloads go from guest
 * memory to the socket and back, and nobody but the lane hears of them. All other packets are left
 * in an inbox for Python, which puts its own into the receive ring.
 *
 * A connection lasts as long as its program has something to read or the guest something to take. A
 * program may be as slow as it likes; a guest may not, once the program has gone. */
#ifndef AV_VSOCK_H
#define AV_VSOCK_H

#include <stdint.h>

#include "home.h"
#include "vring.h"

#define AV_VSOCK_HEADER_BYTES 44u

/* cdef begin */
/* path: guests' programs that connect to a port P reach the unix socket path_P, where Python does
 * not serve it; NULL: only Python. announces: news are told by AV_LANE_NEWS, as a home with a
 * thread needs it; else Python looks after each turn. ask_ns, close_ns: how long the guest may take
 * to answer, and to close its end or take anything after a program closed; at rest nothing is
 * expected of it. unread_max: connections that the guest has closed and whose programs have not read
 * all; at one more, it is reset, and the program has what is in its socket by then. */
struct av_vsock_setup {
    uint64_t cid;
    const char *path;
    uint64_t ask_ns;
    uint64_t close_ns;
    uint32_t connections_max;
    uint32_t unread_max;
    uint32_t announces;
};

/* What a socket's two ends cannot tell by it, in memory that both have: how a connection ended, and
 * what for, which stands before SHUT does.
 * lane: AV_VSOCK_REFUSED by the guest; ENDED: the guest sends no more, said so, and all it sent is in
 * the socket; CLOSED: both ways, too; SHUT: the lane has closed its end; GONE: nor will it write here
 * any more. program: AV_VSOCK_ABORTED: it closes, and the guest is to see a reset. */
struct av_vsock_fate {
    uint8_t lane;
    uint8_t program;
    uint8_t reason;
};
enum av_vsock_ends {
    AV_VSOCK_REFUSED = 1,
    AV_VSOCK_ENDED = 2,
    AV_VSOCK_CLOSED = 4,
    AV_VSOCK_SHUT = 8,
    AV_VSOCK_GONE = 16
};
enum av_vsock_gives_up { AV_VSOCK_ABORTED = 1 };
/* NOT_SAID: the device is no more. UNSENT: the guest says that it has read more than it was sent. */
enum av_vsock_reason {
    AV_VSOCK_NOT_SAID,
    AV_VSOCK_GUEST_RESET,
    AV_VSOCK_DRIVER_RESET,
    AV_VSOCK_DEVICE_BROKEN,
    AV_VSOCK_BAD_OPERATION,
    AV_VSOCK_BAD_DATA,
    AV_VSOCK_BAD_SHUTDOWN,
    AV_VSOCK_UNSENT,
    AV_VSOCK_NO_ROOM,
    AV_VSOCK_LATE,
    AV_VSOCK_UNREAD,
    AV_VSOCK_NO_MEMORY
};

/* Of spliced connections, but for `connections`, which counts Python's too. */
struct av_vsock_stats {
    uint64_t connections;
    uint64_t opened;
    uint64_t refused;
    uint64_t rx_packets; /* of the guest's */
    uint64_t rx_bytes;
    uint64_t tx_bytes;
};

/* Packets for Python: headers one after the other, and payloads one after the other. */
struct av_vsock_batch {
    uint8_t *headers;
    uint8_t *data;
    uint32_t count;
    uint32_t bytes;
};

/* INBOX: packets wait. ROOM: where a packet of Python's found none, there is some now, and maybe
 * kept for it until av_vsock_flush().
 * TIMER: a connection waits for the guest, so av_vsock_expire() is to be called now and then. */
enum av_vsock_news { AV_VSOCK_INBOX = 1, AV_VSOCK_ROOM = 2, AV_VSOCK_TIMER = 4 };

struct av_vsock;
/* home and rings are borrowed, setup is copied. NULL: *error is the errno. */
struct av_vsock *av_vsock_create(struct av_home *home, struct av_vring *rx, struct av_vring *tx,
                                 const struct av_vsock_setup *setup, int *error);
void av_vsock_destroy(struct av_vsock *vsock); /* its lane is at rest */
struct av_lane *av_vsock_lane(struct av_vsock *vsock); /* kicks: receive, transmit */
void av_vsock_statistics(struct av_vsock *vsock, struct av_vsock_stats *out);
/* av_vsock_news bits since av_vsock_news() was called last, to be looked at on the home's thread. */
const uint32_t *av_vsock_news_bits(const struct av_vsock *vsock);
uint32_t av_vsock_news(struct av_vsock *vsock);

/* Python serves the port, or no more. 0 or -ENOMEM. */
int av_vsock_serve(struct av_vsock *vsock, uint32_t host_port, int serving);
/* A connection of Python's gets, and gives back, its place among all. 0, -EEXIST, -ENOSPC too many,
 * or -ENOMEM. */
int av_vsock_claim(struct av_vsock *vsock, uint32_t host_port, uint32_t guest_port);
void av_vsock_release(struct av_vsock *vsock, uint32_t host_port, uint32_t guest_port);
/* Ask the guest to accept a program, and splice then, with "OK host_port\n" first. Takes fd, which
 * does not block, over in any case. fate: of both ends, borrowed until GONE; the program itself says
 * then how long it waits. NULL: none. 0 or -errno; GONE does not come then. */
int av_vsock_ask(struct av_vsock *vsock, int fd, uint32_t guest_port, struct av_vsock_fate *fate);
/* Accept the guest, which asked for a connection that is Python's so far, and splice: the same of fd
 * and fate. guest_alloc: of the guest's request. 0, -ENOENT there is none, or another -errno. */
int av_vsock_accept(struct av_vsock *vsock, int fd, uint32_t host_port, uint32_t guest_port,
                    uint32_t guest_alloc, struct av_vsock_fate *fate);
/* End what has waited too long; how many still wait. */
uint32_t av_vsock_expire(struct av_vsock *vsock);
/* The driver begins anew, or has to: forget packets, and spliced connections that it knew of. reason:
 * of av_vsock_reason. At rest. */
void av_vsock_reset(struct av_vsock *vsock, uint32_t reason);

/* Packets that came for Python, valid until the next call; how many. */
uint32_t av_vsock_receive(struct av_vsock *vsock, struct av_vsock_batch *out);
/* Put a payload into the receive ring, in as many packets as the driver's buffers make of it, each
 * with this header and its own length. How many bytes found room, or -EPROTO. When it was not all
 * AV_VSOCK_ROOM follows. */
int64_t av_vsock_put(struct av_vsock *vsock, const uint8_t *header, const uint8_t *data,
                     uint32_t bytes);
/* The same of a packet that is only a header. 1, 0 no room, or -EPROTO. */
int av_vsock_put_header(struct av_vsock *vsock, const uint8_t *header);
/* Show the driver what was put, and leave room to others. */
void av_vsock_flush(struct av_vsock *vsock);
/* cdef end */

#endif
