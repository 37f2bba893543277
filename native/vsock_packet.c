#include <errno.h>
#include <string.h>

#include "vsock_internal.h"

struct iovec *av_vsock_gather(struct iovec *iov, void *to, size_t bytes)
{
    uint8_t *at = to;

    while (bytes != 0) {
        size_t piece = iov->iov_len < bytes ? iov->iov_len : bytes;

        memcpy(at, iov->iov_base, piece);
        at += piece;
        bytes -= piece;
        iov->iov_base = (uint8_t *)iov->iov_base + piece;
        iov->iov_len -= piece;
        if (iov->iov_len == 0)
            iov++;
    }
    return iov;
}

struct iovec *av_vsock_scatter(struct iovec *iov, const void *from, size_t bytes)
{
    const uint8_t *at = from;

    while (bytes != 0) {
        size_t piece = iov->iov_len < bytes ? iov->iov_len : bytes;

        memcpy(iov->iov_base, at, piece);
        at += piece;
        bytes -= piece;
        iov->iov_base = (uint8_t *)iov->iov_base + piece;
        iov->iov_len -= piece;
        if (iov->iov_len == 0)
            iov++;
    }
    return iov;
}

uint32_t av_vsock_cut(struct iovec *iov, uint32_t bytes)
{
    uint32_t count = 0;

    while (bytes != 0) {
        if (iov[count].iov_len > bytes)
            iov[count].iov_len = bytes;
        bytes -= (uint32_t)iov[count++].iov_len;
    }
    return count;
}

int av_vsock_refuse(struct av_vring *ring)
{
    av_vring_fail(ring, AV_FAULT_REQUEST);
    return -EPROTO;
}

int64_t av_vsock_put_packet(struct av_vsock *vsock, const struct av_vsock_header *header,
                            const uint8_t *data, uint32_t bytes)
{
    struct av_vsock_header own = *header;
    struct iovec *rest;
    struct av_chain chain;
    uint32_t room;
    int result = av_vring_pop(vsock->rx, &chain, vsock->iov, AV_VSOCK_SEGMENTS_MAX);

    if (result <= 0)
        return result < 0 ? result : -EAGAIN;
    if (chain.writable_bytes < AV_VSOCK_HEADER_BYTES + (bytes != 0))
        return av_vsock_refuse(vsock->rx);
    room = chain.writable_bytes - AV_VSOCK_HEADER_BYTES;
    if (bytes > room)
        bytes = room;
    own.len = bytes;
    rest = av_vsock_scatter(vsock->iov + chain.readable, &own, sizeof(own));
    av_vsock_scatter(rest, data, bytes);
    av_vring_push(vsock->rx, chain.head, AV_VSOCK_HEADER_BYTES + bytes);
    return bytes;
}
