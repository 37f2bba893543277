/* What switch.c (ports and turns), switch_link.c, switch_table.c and switch_capture.c share. */
#ifndef AV_SWITCH_INTERNAL_H
#define AV_SWITCH_INTERNAL_H

#include <stdbool.h>
#include <stdint.h>

#include "frames.h"
#include "offload.h"
#include "switch.h"

#define AV_SWITCH_NOBODY UINT32_MAX

/* One direction of a port's link. */
struct av_link {
    struct av_frames under_way; /* in the order of at_ns; all zero while nothing was delayed */
    uint64_t random;
    uint64_t free_ns; /* when the last bit of the last frame leaves */
    uint64_t last_ns; /* when the last frame arrives */
};

struct av_port {
    struct av_cable_end *end; /* NULL: no port */
    struct av_switch_link settings;
    struct av_link in, out; /* as seen from the switch */
    uint32_t queue_bytes;
    uint64_t swept_ns;
    struct av_switch_port_stats stats;
};

struct av_address {
    uint8_t mac[6];
    uint32_t port; /* AV_SWITCH_NOBODY: free */
    uint64_t heard_ns;
};

struct av_table {
    struct av_address *address;
    uint32_t sets;
    uint32_t port_max;
    uint64_t age_ns;
    uint64_t secret; /* so that nobody outside can choose addresses of one set */
};

struct av_capture {
    int fd; /* -1: none */
    int error;
    uint32_t snap_bytes;
    uint32_t buffered;
    uint64_t max_bytes;
    uint64_t bytes;
    uint8_t *buffer;
};

struct av_switch {
    int epoll_fd, event_fd, timer_fd;
    uint64_t armed_ns;
    uint32_t ports_end; /* no port has a number from here on */
    uint32_t port_room;
    struct av_port **port;
    struct av_table table;
    struct av_capture capture;
    uint64_t seed;
    int64_t wall_less_now_ns;
    uint8_t *scratch; /* a segment */
    struct av_switch_stats stats;
};

/* A frame on its way: header and data are of a frame in some queue. */
struct av_transit {
    const uint8_t *header;
    const uint8_t *data;
    uint32_t bytes;
};

uint64_t av_random(uint64_t *state);

int av_table_init(struct av_table *table, const struct av_switch_setup *setup, uint64_t secret);
uint32_t av_table_find(const struct av_table *table, const uint8_t *mac, uint64_t now_ns);
void av_table_learn(struct av_switch *sw, uint32_t port, const uint8_t *mac, uint64_t now_ns);
void av_table_forget_port(struct av_switch *sw, uint32_t port);

/* What comes out of a link, and when. */
typedef void av_arrive(struct av_switch *sw, uint32_t port, const struct av_transit *frame,
                       uint64_t at_ns);
/* Put a frame into one direction of a port's link at now_ns. */
void av_link_send(struct av_switch *sw, uint32_t port, struct av_link *link,
                  const struct av_transit *frame, uint64_t now_ns, av_arrive *arrive);
/* Let arrive what is due, up to `budget` frames; when the next one is, or 0. */
uint64_t av_link_advance(struct av_switch *sw, uint32_t port, struct av_link *link,
                         uint64_t now_ns, uint32_t *budget, av_arrive *arrive);
/* Whether the link takes the largest frame without dropping one. */
bool av_link_has_room(struct av_link *link);

void av_capture_frame(struct av_switch *sw, const struct av_transit *frame, uint64_t at_ns);
void av_capture_flush(struct av_switch *sw);
int av_capture_stop(struct av_switch *sw);

#endif
