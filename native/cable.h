/* A cable in memory between two users of frames: a NIC's lane, Python, a switch. Each end has a
 * bounded queue of frames that came and were not taken.
 *
 * Any thread, one user an end. A lock is held while a frame is copied. */
#ifndef AV_CABLE_H
#define AV_CABLE_H

#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "frames.h"

/* cdef begin */
struct av_cable_stats {
    uint64_t sent_frames;
    uint64_t sent_bytes;
    uint64_t taken_frames;
    uint64_t taken_bytes;
    uint64_t lost_down; /* sent by this end while either end was down */
    uint64_t lost_full; /* sent by this end, for which the other had no room */
    uint64_t refused;   /* sent by this end, too short or long, or with a header without sense */
    uint64_t segmented; /* sent by this end, and made into smaller ones for the other */
    uint64_t queued_frames; /* to be taken by this end */
    uint64_t queued_bytes;
};

struct av_cable;
struct av_cable_end;
/* queue_bytes: of each end. Both ends are down. NULL: *error is the errno. */
struct av_cable *av_cable_create(uint32_t queue_bytes, int *error);
void av_cable_destroy(struct av_cable *cable);
struct av_cable_end *av_cable_end(struct av_cable *cable, int side); /* 0 or 1 */
/* An eventfd, borrowed, for what an end waits for: frames, after it found none, or room, after it
 * found none. -1: none; when this returns, nobody uses the one before. It is written now, too. */
void av_cable_watch(struct av_cable_end *end, int event_fd);
void av_cable_wake(struct av_cable_end *end); /* write it */
/* Frames pass while both ends are up. What waits for an end that goes down is gone. */
void av_cable_set_up(struct av_cable_end *end, int up);
int av_cable_is_up(struct av_cable_end *end); /* whether both are */
/* What this end takes of frames that are not complete: bits as TUNSETOFFLOAD's. */
void av_cable_set_offloads(struct av_cable_end *end, uint32_t offloads);
/* Whether a NIC that sends to this end, which is full, waits; otherwise the frame is lost. */
void av_cable_set_patient(struct av_cable_end *end, int patient);
/* Send complete frames that lie one after the other; how many went, lost ones among them. Fewer
 * than `count` when there is no more room. header: of 12 bytes for all of them, or NULL. */
int av_cable_send(struct av_cable_end *end, const uint8_t *header, const uint8_t *data,
                  const uint32_t *lengths, uint32_t count);
/* Take up to `max` frames, one after the other, without headers; how many. */
int av_cable_take(struct av_cable_end *end, uint8_t *to, uint32_t room_bytes, uint32_t *lengths,
                  uint32_t max);
void av_cable_statistics(struct av_cable_end *end, struct av_cable_stats *out);
/* cdef end */

/* For a NIC's lane, as on a TAP: a packet is a header of 12 bytes and a frame. -1 and errno; EAGAIN
 * for no frame, or no room at the end of somebody patient. */
ssize_t av_cable_readv(struct av_cable_end *end, const struct iovec *iov, uint32_t count);
ssize_t av_cable_writev(struct av_cable_end *end, const struct iovec *iov, uint32_t count);
int av_cable_has_room(struct av_cable_end *end); /* whether there came some after EAGAIN */
/* For a switch: the oldest frame, which stays where it is until it is popped; NULL: none. */
struct av_frame *av_cable_front(struct av_cable_end *end);
void av_cable_pop(struct av_cable_end *end);
/* Send a frame with a header that was parsed; 0, or why it is lost: -EAGAIN for want of room,
 * -ENOTCONN with an end down. */
int av_cable_forward(struct av_cable_end *end, const uint8_t *header, const uint8_t *data,
                     uint32_t bytes);

#endif
