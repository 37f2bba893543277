/* Plain bytes over virtqueues: what a console and its ports carry (virtio 1.3 section 5.3.6). */
#ifndef AV_STREAM_H
#define AV_STREAM_H

#include <stddef.h>
#include <stdint.h>

#include "vring.h"

/* cdef begin */
struct av_stream;
/* One direction of a stream, over a ring that is borrowed. NULL: errno. */
struct av_stream *av_stream_create(struct av_vring *ring);
void av_stream_destroy(struct av_stream *stream);
/* Take up to `room` bytes that the driver sent, and give back the chains that were taken to their
 * end. 1: there may be more, and the driver is not asked to kick; 0: there was no more, and it is;
 * -EPROTO the guest broke the ring. `taken` counts in every case. */
int av_stream_take(struct av_stream *stream, uint8_t *to, uint32_t room, uint32_t *taken);
/* Give the driver up to `count` bytes, in the buffers that it offers. 0: they were all taken; 1: it
 * has to offer more first, and is asked to kick; -EPROTO. `taken` counts in every case. */
int av_stream_put(struct av_stream *stream, const uint8_t *from, uint32_t count, uint32_t *taken);
/* The ring was stopped. */
void av_stream_forget(struct av_stream *stream);
/* cdef end */

#endif
