/* A switch in memory: it learns which address is behind which of its ports, and each port's link
 * delays and loses what it carries, as it is told. One thread; takes what time it is. */
#ifndef AV_SWITCH_H
#define AV_SWITCH_H

#include <stdint.h>

#include "cable.h"

/* cdef begin */
struct av_switch_setup {
    uint64_t seed;          /* of what links lose and of their jitter */
    uint64_t age_ns;        /* an address not heard of for so long is forgotten */
    uint32_t addresses_max; /* of all ports; rounded up to a power of two */
    uint32_t port_addresses_max;
};

/* What a link does to frames, the same in both directions. All 0: nothing, at once. */
struct av_switch_link {
    uint64_t delay_ns;
    uint64_t jitter_ns;   /* added at random, 0 to so much; frames stay in order */
    uint64_t bytes_per_s; /* 0: no limit */
    uint64_t loss;        /* out of 2^32 */
};

struct av_switch_port_stats {
    uint64_t in_frames; /* that came out of the link, into the switch */
    uint64_t in_bytes;
    uint64_t out_frames; /* put into the cable */
    uint64_t out_bytes;
    uint64_t lost;    /* by the link's loss, both ways */
    uint64_t dropped; /* no room: in the link for its delay, or in the cable for who reads slowly */
    uint64_t down;    /* for which nobody was there, or no cable */
    uint64_t refused; /* with a group's address as its sender's */
    uint64_t in_flight_frames; /* delayed, now */
    uint32_t addresses;
};

struct av_switch_stats {
    uint64_t frames;
    uint64_t flooded;   /* to all ports but its own: a group's, or nobody known */
    uint64_t same_port; /* for somebody behind the port from which it came */
    uint64_t moved;     /* addresses that were behind another port before */
    uint64_t unlearned; /* frames whose sender found no place in the table */
    uint64_t captured_frames;
    uint64_t captured_bytes; /* of the file */
    uint64_t uncaptured;     /* frames after the file was full or failed */
    uint32_t addresses;
};

struct av_switch;
struct av_switch *av_switch_create(const struct av_switch_setup *setup, int *error);
void av_switch_destroy(struct av_switch *sw);
int av_switch_fd(const struct av_switch *sw); /* readable: a turn is due */
int av_switch_event_fd(const struct av_switch *sw); /* for av_cable_watch() of its ends */
/* The number of a new port, or -errno. end: borrowed, with its watch on our event fd. queue_bytes:
 * at most delayed in each direction. */
int av_switch_attach(struct av_switch *sw, struct av_cable_end *end, uint32_t queue_bytes);
void av_switch_detach(struct av_switch *sw, uint32_t port);
/* 0 or -ENOMEM. Frames under way arrive when they would have. */
int av_switch_set_link(struct av_switch *sw, uint32_t port, const struct av_switch_link *link);
/* Forget what is under way on a link that was cut, and who was behind it. */
void av_switch_cut(struct av_switch *sw, uint32_t port);
/* Move what is due, a bounded amount; 1 when there is more to do at once. now_ns: CLOCK_MONOTONIC;
 * wall_ns: the time of day, for captures. *next_ns: when the next turn is due, 0: when told. */
int av_switch_turn(struct av_switch *sw, uint64_t now_ns, uint64_t wall_ns, uint64_t *next_ns);
/* Write frames that enter the switch to a file, borrowed, of classic pcap with nanoseconds: complete,
 * in segments, up to snap_bytes of each, as long as the file has at most max_bytes (0: no limit).
 * -1: stop. 0 or -errno: what the last capture failed with. */
int av_switch_capture(struct av_switch *sw, int fd, uint32_t snap_bytes, uint64_t max_bytes);
int av_switch_statistics(struct av_switch *sw, struct av_switch_stats *out); /* capture's -errno */
void av_switch_port_statistics(struct av_switch *sw, uint32_t port,
                               struct av_switch_port_stats *out);
/* The port behind which an address is known at that time, or -1. */
int av_switch_find(struct av_switch *sw, const uint8_t *mac, uint64_t now_ns);
/* cdef end */

#endif
