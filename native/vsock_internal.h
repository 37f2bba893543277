/* What vsock.c (the device and its lane), vsock_packet.c (packets in rings), vsock_table.c (which
 * connection is which), vsock_join.c (programs that are joined to the guest), vsock_tx.c (what the
 * guest sends) and vsock_rx.c (what it is sent) share.
 * All with the home's lock held. */
#ifndef AV_VSOCK_INTERNAL_H
#define AV_VSOCK_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "lane.h"
#include "vsock.h"

/* What is kept of one connection for a program that does not read; the guest stops then. */
#define AV_VSOCK_BUFFER_BYTES (256u * 1024)
/* The guest is told of room when there is so much more than it knows of. */
#define AV_VSOCK_UPDATE_BYTES (AV_VSOCK_BUFFER_BYTES / 2)
/* What one connection moves before another has its turn. */
#define AV_VSOCK_SLICE_BYTES (64u * 1024)
#define AV_VSOCK_BUCKETS 4096u
#define AV_VSOCK_INBOX_PACKETS 64u
#define AV_VSOCK_SEGMENTS_MAX 256u /* of a chain */
#define AV_VSOCK_CID_HOST 2u
#define AV_VSOCK_TYPE_STREAM 1u

enum av_vsock_op {
    AV_VSOCK_OP_INVALID,
    AV_VSOCK_OP_REQUEST,
    AV_VSOCK_OP_RESPONSE,
    AV_VSOCK_OP_RST,
    AV_VSOCK_OP_SHUTDOWN,
    AV_VSOCK_OP_RW,
    AV_VSOCK_OP_CREDIT_UPDATE,
    AV_VSOCK_OP_CREDIT_REQUEST
};

/* Of a shutdown: what its sender will not do any more. */
#define AV_VSOCK_SHUT_RECEIVE 1u
#define AV_VSOCK_SHUT_SEND 2u
#define AV_VSOCK_SHUT_BOTH 3u

struct av_vsock_header {
    uint64_t src_cid;
    uint64_t dst_cid;
    uint32_t src_port;
    uint32_t dst_port;
    uint32_t len;
    uint16_t type;
    uint16_t op;
    uint32_t flags;
    uint32_t buf_alloc;
    uint32_t fwd_cnt;
} __attribute__((packed));
_Static_assert(sizeof(struct av_vsock_header) == AV_VSOCK_HEADER_BYTES, "struct virtio_vsock_hdr");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "its fields are little-endian");

/* PYTHONS: only a name. CLOSING: we have closed, and wait for the guest to do so. DEAD: a reset is
 * all that is to be sent. DRAINING: the guest is done, and the program has not read all of it. */
enum av_vsock_state {
    AV_VSOCK_PYTHONS,
    AV_VSOCK_ASKED,
    AV_VSOCK_OPEN,
    AV_VSOCK_CLOSING,
    AV_VSOCK_DEAD,
    AV_VSOCK_DRAINING
};

/* Packets that are due, in the order in which they go; data goes between the two lines. */
#define AV_VSOCK_DUE_RST 1u
#define AV_VSOCK_DUE_REQUEST 2u
#define AV_VSOCK_DUE_RESPONSE 4u

#define AV_VSOCK_DUE_SHUTDOWN 8u
#define AV_VSOCK_DUE_CREDIT 16u

struct av_vsock_link {
    struct av_vsock_link *next, *prev;
};

struct av_vsock_connection {
    struct av_vsock_link ready; /* first; linked in when there is something to send */
    struct av_vsock_link all;
    struct av_vsock_connection *chain; /* of its bucket */
    bool named;                        /* in a bucket */
    uint32_t host_port, guest_port;
    enum av_vsock_state state;
    uint32_t due;
    uint32_t shut, guest_shut;
    int fd;
    struct av_vsock_fate *fate; /* NULL: nobody asks */
    bool readable;    /* the socket was not seen empty since its last event */
    bool ends;        /* there is an end behind what can be read */
    bool has_eof;     /* and it was read */
    bool hung_up;     /* nobody is at its other end */
    bool deaf;        /* and it takes no more */
    bool wants_write; /* an event is to tell when it takes more */
    bool unread;      /* the guest has closed, and the program has not read all */
    /* Both directions' counters of bytes, modulo 2^32 (5.10.6.3). Of the guest's nothing is
     * believed. */
    uint32_t received, forwarded, told;
    uint32_t sent, guest_alloc, guest_forwarded;
    /* What the socket had no room for: `held` bytes from `held_at` on. */
    uint8_t *buffer;
    uint32_t held_at, held, buffer_bytes;
    uint64_t deadline_ns; /* 0: none */
};

struct av_vsock_inbox {
    uint8_t headers[AV_VSOCK_INBOX_PACKETS * AV_VSOCK_HEADER_BYTES];
    uint8_t data[AV_VSOCK_BUFFER_BYTES];
    uint32_t count, bytes;
};

struct av_vsock {
    struct av_lane lane; /* first: its home gives it back */
    struct av_vring *rx, *tx;
    struct av_vsock_setup setup;
    char *path; /* owned: setup.path */
    bool walled; /* sockets are read and written by calls that carry no descriptors */
    int sockets_fd; /* an epoll of all sockets */
    uint32_t sockets_source;
    uint64_t seed; /* of names' places, which a guest must not know */
    struct av_vsock_connection *bucket[AV_VSOCK_BUCKETS];
    struct av_vsock_link all, ready;
    uint32_t connections; /* Python's, and spliced ones, to the end of their sockets */
    uint32_t waiting;     /* have a deadline */
    uint32_t unread;
    uint32_t *served;     /* Python's ports */
    uint32_t served_count, served_room;
    uint32_t next_port;
    uint32_t news;
    bool tx_blocked;     /* the inbox is full */
    bool rx_starved;     /* the driver has no room for what is spliced */
    bool python_starved; /* or for Python's packets */
    bool python_first;   /* what was put last was not Python's: room is, if it waits for some */
    bool python_turn;    /* it was told of room, which is its own until av_vsock_flush() */
    bool more_events;
    /* Interrupts that nobody waits for are held back, to speak for what follows too: those of
     * packets that were taken, and of the answer to a guest that has closed. */
    int timer_fd; /* ends a hold */
    uint32_t timer_source;
    bool timer_set;
    uint32_t tx_held, tx_fresh; /* chains; and of those since the timer was set */
    bool rx_held, rx_urgent;
    uint32_t rx_in_vain; /* holds in a row during which nothing else came */
    uint32_t rx_skip;    /* so many times there will be none */
    struct av_vsock_inbox *inbox; /* the one being filled */
    struct av_vsock_inbox *taken;
    struct av_vsock_stats stats;
    struct iovec iov[2 * AV_VSOCK_SEGMENTS_MAX]; /* of a chain, or of several */
    struct iovec payload[2 * AV_VSOCK_SEGMENTS_MAX];
};

/* vsock.c */
/* Show the driver what was done with each ring, and interrupt it unless that can wait. */
void av_vsock_announce_tx(struct av_vsock *vsock, uint32_t taken);
void av_vsock_announce_rx(struct av_vsock *vsock);
void av_vsock_tell(struct av_vsock *vsock, uint32_t news);
uint64_t av_vsock_now_ns(void);

/* vsock_packet.c */
/* Copy `bytes`, which are there, off the front of segments, and shorten them by it. */
struct iovec *av_vsock_gather(struct iovec *iov, void *to, size_t bytes);
/* The other way, into segments that have room for it. */
struct iovec *av_vsock_scatter(struct iovec *iov, const void *from, size_t bytes);
/* The first `bytes` of segments, which are there; how many segments. */
uint32_t av_vsock_cut(struct iovec *iov, uint32_t bytes);
/* A chain that is no packet, or no place for one: -EPROTO. */
int av_vsock_refuse(struct av_vring *ring);
/* Put one packet with as much of the payload as its buffer holds, at least one byte if there is
 * any: how much, -EAGAIN no room, or -EPROTO. */
int64_t av_vsock_put_packet(struct av_vsock *vsock, const struct av_vsock_header *header,
                            const uint8_t *data, uint32_t bytes);

/* vsock_table.c */
/* One more, in no list of names; NULL: no memory. Owns fd then. */
struct av_vsock_connection *av_vsock_new(struct av_vsock *vsock, enum av_vsock_state state, int fd,
                                         uint32_t host_port, uint32_t guest_port);
void av_vsock_free(struct av_vsock *vsock, struct av_vsock_connection *connection);
struct av_vsock_connection *av_vsock_find(const struct av_vsock *vsock, uint32_t host_port,
                                          uint32_t guest_port);
void av_vsock_name(struct av_vsock *vsock, struct av_vsock_connection *connection);
void av_vsock_unname(struct av_vsock *vsock, struct av_vsock_connection *connection);
bool av_vsock_serves(const struct av_vsock *vsock, uint32_t host_port);
/* Wait for the guest for so long, or, by 0, no more. */
void av_vsock_wait(struct av_vsock *vsock, struct av_vsock_connection *connection,
                   uint64_t limit_ns);
/* Something about it changed: it is in the list of those with something to send if it is so. */
void av_vsock_wake(struct av_vsock *vsock, struct av_vsock_connection *connection);
/* The guest knows of it no more, but its program may still have something to read. It may be gone. */
void av_vsock_bury(struct av_vsock *vsock, struct av_vsock_connection *connection);
/* End it now: the guest gets a reset, and the program the reason. */
void av_vsock_kill(struct av_vsock *vsock, struct av_vsock_connection *connection,
                   enum av_vsock_reason reason);
/* Take no more of the guest's, or send it no more; both: it is over. */
void av_vsock_shut(struct av_vsock *vsock, struct av_vsock_connection *connection, uint32_t flags);
/* Let go of the socket, and of what was kept for it. */
void av_vsock_close(struct av_vsock *vsock, struct av_vsock_connection *connection);

/* vsock_join.c */
/* Tell its program, by av_vsock_ends bits, before what they explain. */
void av_vsock_tell_fate(struct av_vsock_connection *connection, uint8_t ends);
/* Nothing when its socket is closed: then it has been told. */
void av_vsock_tell_reason(struct av_vsock_connection *connection, enum av_vsock_reason reason);
bool av_vsock_is_aborted(const struct av_vsock_connection *connection);
/* Whether it has waited for the guest for long enough. */
bool av_vsock_is_late(const struct av_vsock_connection *connection, uint64_t now_ns);

/* vsock_tx.c */
/* Packets of the guest's, a bounded number. 1 more to do, 0, or -EPROTO. */
int av_vsock_transmit(struct av_vsock *vsock);
/* The socket takes more. It may be the connection's end. */
void av_vsock_drain(struct av_vsock *vsock, struct av_vsock_connection *connection);

/* vsock_rx.c */
/* What is due to the guest, a bounded amount. 1 more to do, 0, or -EPROTO. */
int av_vsock_deliver(struct av_vsock *vsock);
/* Whether its socket can be read for the guest. */
bool av_vsock_can_read(const struct av_vsock_connection *connection);

static inline struct av_vsock_connection *av_vsock_of_all(struct av_vsock_link *link)
{
    return (struct av_vsock_connection *)((char *)link -
                                          offsetof(struct av_vsock_connection, all));
}

static inline bool av_vsock_is_linked(const struct av_vsock_link *link)
{
    return link->next != NULL;
}

static inline void av_vsock_link_after(struct av_vsock_link *before, struct av_vsock_link *link)
{
    link->prev = before;
    link->next = before->next;
    before->next->prev = link;
    before->next = link;
}

static inline void av_vsock_unlink(struct av_vsock_link *link)
{
    if (!av_vsock_is_linked(link))
        return;
    link->prev->next = link->next;
    link->next->prev = link->prev;
    link->next = link->prev = NULL;
}

#endif
