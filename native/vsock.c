#include "vsock.h"

#include <errno.h>
#include <string.h>

#define SEGMENTS_MAX 256u
#define LEN_AT 24u /* of a header: the payload's bytes, little-endian */

static uint32_t payload_bytes(const uint8_t *header)
{
    const uint8_t *at = header + LEN_AT;

    return (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

static void set_payload_bytes(uint8_t *header, uint32_t bytes)
{
    for (uint32_t i = 0; i < 4; i++)
        header[LEN_AT + i] = (uint8_t)(bytes >> 8 * i);
}

/* Copy `bytes`, which are there, off the front of segments, and shorten them by it. */
static struct iovec *gather(struct iovec *iov, uint8_t *to, size_t bytes)
{
    while (bytes != 0) {
        size_t piece = iov->iov_len < bytes ? iov->iov_len : bytes;

        memcpy(to, iov->iov_base, piece);
        to += piece;
        bytes -= piece;
        iov->iov_base = (uint8_t *)iov->iov_base + piece;
        iov->iov_len -= piece;
        if (iov->iov_len == 0)
            iov++;
    }
    return iov;
}

/* The other way, into segments that have room for it. */
static struct iovec *scatter(struct iovec *iov, const uint8_t *from, size_t bytes)
{
    while (bytes != 0) {
        size_t piece = iov->iov_len < bytes ? iov->iov_len : bytes;

        memcpy(iov->iov_base, from, piece);
        from += piece;
        bytes -= piece;
        iov->iov_base = (uint8_t *)iov->iov_base + piece;
        iov->iov_len -= piece;
        if (iov->iov_len == 0)
            iov++;
    }
    return iov;
}

/* A chain that is no packet, or no place for one. */
static int refuse(struct av_vring *ring)
{
    av_vring_fail(ring, AV_FAULT_REQUEST);
    return -EPROTO;
}

int av_vsock_take(struct av_vring *ring, uint8_t *headers, uint32_t max, uint8_t *data,
                  uint32_t room)
{
    struct iovec iov[SEGMENTS_MAX], *rest;
    struct av_chain chain;
    uint32_t count = 0, used = 0, bytes;
    int result = 0;

    while (count < max && (result = av_vring_pop(ring, &chain, iov, SEGMENTS_MAX)) > 0) {
        uint8_t *header = headers + (size_t)count * AV_VSOCK_HEADER_BYTES;

        if (chain.readable_bytes < AV_VSOCK_HEADER_BYTES) {
            result = refuse(ring);
            break;
        }
        rest = gather(iov, header, AV_VSOCK_HEADER_BYTES);
        bytes = payload_bytes(header);
        if (bytes > chain.readable_bytes - AV_VSOCK_HEADER_BYTES || bytes > room) {
            result = refuse(ring);
            break;
        }
        if (bytes > room - used) {
            av_vring_unpop(ring);
            break;
        }
        gather(rest, data + used, bytes);
        used += bytes;
        count++;
        av_vring_push(ring, chain.head, 0);
    }
    /* What came before a broken one counts; the ring remembers. */
    return count != 0 ? (int)count : result < 0 ? result : 0;
}

/* Put one packet with as much of the payload as its buffer holds, at least one byte if there is
 * any: how much, -EAGAIN no room, or -EPROTO. */
static int64_t put_packet(struct av_vring *ring, const uint8_t *header, const uint8_t *data,
                          uint32_t bytes)
{
    struct iovec iov[SEGMENTS_MAX], *rest;
    uint8_t own[AV_VSOCK_HEADER_BYTES];
    struct av_chain chain;
    uint32_t room;
    int result = av_vring_pop(ring, &chain, iov, SEGMENTS_MAX);

    if (result <= 0)
        return result < 0 ? result : -EAGAIN;
    if (chain.writable_bytes < AV_VSOCK_HEADER_BYTES + (bytes != 0))
        return refuse(ring);
    room = chain.writable_bytes - AV_VSOCK_HEADER_BYTES;
    if (bytes > room)
        bytes = room;
    memcpy(own, header, sizeof(own));
    set_payload_bytes(own, bytes);
    rest = scatter(iov + chain.readable, own, sizeof(own));
    scatter(rest, data, bytes);
    av_vring_push(ring, chain.head, AV_VSOCK_HEADER_BYTES + bytes);
    return bytes;
}

int64_t av_vsock_put(struct av_vring *ring, const uint8_t *header, const uint8_t *data,
                     uint32_t bytes)
{
    uint32_t done = 0;

    while (done < bytes) {
        int64_t put = put_packet(ring, header, data + done, bytes - done);

        if (put < 0)
            return put == -EAGAIN || done != 0 ? done : put;
        done += (uint32_t)put;
    }
    return done;
}

int av_vsock_put_header(struct av_vring *ring, const uint8_t *header)
{
    int64_t put = put_packet(ring, header, header, 0);

    return put == -EAGAIN ? 0 : put < 0 ? (int)put : 1;
}
