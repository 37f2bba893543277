/* A bounded queue of frames in memory, each in one piece. No lock: see who embeds one. */
#ifndef AV_FRAMES_H
#define AV_FRAMES_H

#include <stdint.h>

#define AV_VNET_BYTES 12u /* struct virtio_net_hdr_v1 (virtio 1.3 section 5.1.6) */
#define AV_FRAME_MIN_BYTES 14u
#define AV_FRAME_MAX_BYTES (65535u + 14u + 8u) /* the largest IP packet behind two VLAN tags */

struct av_frame {
    uint64_t at_ns; /* the queue's user's */
    uint32_t bytes; /* without `header` */
    uint8_t header[AV_VNET_BYTES];
    uint8_t data[];
};

/* Frames lie in [head, end) and, when `tail` is behind `head`, [0, tail). */
struct av_frames {
    uint8_t *base;
    uint32_t size_bytes;
    uint32_t head, tail, end;
    uint32_t count;
    uint64_t used_bytes;
};

/* A mapping of its own, which costs memory only as far as it is used. 0 or -errno. */
int av_frames_init(struct av_frames *frames, uint32_t size_bytes);
void av_frames_fini(struct av_frames *frames); /* nothing when it is all zero */
/* Room for a frame of `bytes`, not in the queue before av_frames_commit(); NULL: it is full. */
struct av_frame *av_frames_reserve(struct av_frames *frames, uint32_t bytes);
/* The frame reserved last; `bytes` may be less now. */
void av_frames_commit(struct av_frames *frames, struct av_frame *frame);
/* The oldest; NULL: empty. It stays where it is until av_frames_pop(). */
struct av_frame *av_frames_front(const struct av_frames *frames);
void av_frames_pop(struct av_frames *frames);
void av_frames_clear(struct av_frames *frames);

#endif
