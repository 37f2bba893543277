#include "stream.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define SEGMENTS_MAX AV_VRING_SIZE_MAX
/* What a chain costs of a call's room at least: chains of one byte must not keep us here. */
#define CHAIN_COST_BYTES 64u

struct av_stream {
    struct av_vring *ring;
    /* Of the next chain, what was taken already. The chain itself is not kept: it is put back,
     * and looked at again, so that nothing is in flight between two calls. */
    uint32_t offset;
    struct iovec iov[SEGMENTS_MAX];
};

struct av_stream *av_stream_create(struct av_vring *ring)
{
    struct av_stream *stream = calloc(1, sizeof(*stream));

    if (stream != NULL)
        stream->ring = ring;
    return stream;
}

void av_stream_destroy(struct av_stream *stream)
{
    free(stream);
}

void av_stream_forget(struct av_stream *stream)
{
    stream->offset = 0;
}

/* Copy from `offset` of a chain's segments on, at most `room` bytes; how many. */
static uint32_t gather(const struct iovec *iov, uint32_t segments, uint32_t offset, uint8_t *to,
                       uint32_t room)
{
    uint32_t done = 0;

    for (uint32_t i = 0; i < segments && done < room; i++) {
        uint32_t len = (uint32_t)iov[i].iov_len, count;

        if (offset >= len) {
            offset -= len;
            continue;
        }
        count = len - offset < room - done ? len - offset : room - done;
        memcpy(to + done, (const uint8_t *)iov[i].iov_base + offset, count);
        done += count;
        offset = 0;
    }
    return done;
}

static uint32_t scatter(const struct iovec *iov, uint32_t segments, const uint8_t *from,
                        uint32_t count)
{
    uint32_t done = 0;

    for (uint32_t i = 0; i < segments && done < count; i++) {
        uint32_t len = (uint32_t)iov[i].iov_len;
        uint32_t part = len < count - done ? len : count - done;

        memcpy(iov[i].iov_base, from + done, part);
        done += part;
    }
    return done;
}

/* The next chain, whose segments all go one way (5.3.6.1.2). 1, 0 or -EPROTO. */
static int pop(struct av_stream *stream, struct av_chain *chain, bool writable)
{
    int result = av_vring_pop(stream->ring, chain, stream->iov, SEGMENTS_MAX);

    if (result == 1 && (writable ? chain->readable : chain->writable) != 0) {
        av_vring_fail(stream->ring, AV_FAULT_REQUEST);
        return -EPROTO;
    }
    return result;
}

/* Take of one chain; what it costs of the room, 0 when there is none, or -EPROTO. */
static int take_chain(struct av_stream *stream, uint8_t *to, uint32_t room, uint32_t *taken)
{
    struct av_chain chain;
    uint32_t done;
    int result = pop(stream, &chain, false);

    if (result <= 0)
        return result;
    done = gather(stream->iov, chain.readable, stream->offset, to, room);
    *taken += done;
    /* The guest may have changed it since it was looked at last, to one that is shorter. */
    if (chain.readable_bytes <= (uint64_t)stream->offset + done) {
        av_vring_push(stream->ring, chain.head, 0);
        stream->offset = 0;
    } else {
        av_vring_unpop(stream->ring);
        stream->offset += done;
    }
    return (int)(done < CHAIN_COST_BYTES ? CHAIN_COST_BYTES : done);
}

int av_stream_take(struct av_stream *stream, uint8_t *to, uint32_t room, uint32_t *taken)
{
    int64_t budget = room;
    int result = 0;

    *taken = 0;
    av_vring_kicks_off(stream->ring);
    while (budget > 0) {
        result = take_chain(stream, to + *taken, room - *taken, taken);
        if (result < 0 || (result == 0 && av_vring_kicks_on(stream->ring) == 0))
            break;
        if (result == 0)
            av_vring_kicks_off(stream->ring);
        budget -= result;
    }
    av_vring_flush(stream->ring);
    return result < 0 ? result : budget <= 0;
}

int av_stream_put(struct av_stream *stream, const uint8_t *from, uint32_t count, uint32_t *taken)
{
    struct av_chain chain;
    int result = 0;

    *taken = 0;
    av_vring_kicks_off(stream->ring);
    while (*taken < count) {
        uint32_t done;

        result = pop(stream, &chain, true);
        if (result < 0)
            break;
        if (result == 0) {
            if (av_vring_kicks_on(stream->ring) == 0)
                break;
            av_vring_kicks_off(stream->ring);
            continue;
        }
        /* Every chain has room: the ring knows no descriptors of zero length. */
        done = scatter(stream->iov, chain.writable, from + *taken, count - *taken);
        av_vring_push(stream->ring, chain.head, done);
        *taken += done;
    }
    av_vring_flush(stream->ring);
    return result < 0 ? result : *taken < count;
}
