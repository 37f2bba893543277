/* To the guest: what is due of each connection, in turns, and what sockets have for it. */
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "vsock_internal.h"

#define BUDGET_BYTES (8u * AV_VSOCK_SLICE_BYTES) /* a run */
#define BUDGET_TURNS 512u
/* Buffers of the driver's that one read may fill: a slice in pages, with some to spare. */
#define CHAINS_MAX 20u

/* A buffer of the driver's, with its segments in vsock->iov[first..). */
struct room {
    uint16_t head;
    uint32_t first;
    uint32_t bytes; /* of payload */
};

static uint32_t credit(const struct av_vsock_connection *connection)
{
    uint32_t ahead = connection->sent - connection->guest_forwarded;

    return ahead >= connection->guest_alloc ? 0 : connection->guest_alloc - ahead;
}

bool av_vsock_can_read(const struct av_vsock_connection *connection)
{
    return connection->state == AV_VSOCK_OPEN && connection->readable && !connection->has_eof &&
           !(connection->guest_shut & AV_VSOCK_SHUT_RECEIVE) && credit(connection) != 0;
}

static struct av_vsock_header header_of(const struct av_vsock *vsock,
                                        const struct av_vsock_connection *connection,
                                        enum av_vsock_op op)
{
    return (struct av_vsock_header){ .src_cid = AV_VSOCK_CID_HOST,
                                     .dst_cid = vsock->setup.cid,
                                     .src_port = connection->host_port,
                                     .dst_port = connection->guest_port,
                                     .type = AV_VSOCK_TYPE_STREAM,
                                     .op = (uint16_t)op,
                                     .buf_alloc = AV_VSOCK_BUFFER_BYTES,
                                     .fwd_cnt = connection->forwarded };
}

/* A packet went, and with it our counters. */
static void told(struct av_vsock_connection *connection)
{
    connection->told = connection->forwarded;
    connection->due &= ~AV_VSOCK_DUE_CREDIT;
}

/* 1, -EAGAIN or -EPROTO. */
static int put(struct av_vsock *vsock, struct av_vsock_connection *connection, uint32_t due,
               enum av_vsock_op op)
{
    struct av_vsock_header header = header_of(vsock, connection, op);
    int64_t result;

    if (op == AV_VSOCK_OP_SHUTDOWN)
        header.flags = connection->shut;
    result = av_vsock_put_packet(vsock, &header, NULL, 0);
    if (result < 0)
        return (int)result;
    if (op != AV_VSOCK_OP_RST || connection->guest_shut != AV_VSOCK_SHUT_BOTH)
        vsock->rx_urgent = true; /* a guest that has closed goes on without the answer */
    vsock->python_first = true;
    connection->due &= ~due;
    told(connection);
    return 1;
}

/* Take buffers for up to `want` bytes; how many, or -EPROTO. `segments`: of vsock->payload. */
static int take_room(struct av_vsock *vsock, struct room *room, uint32_t want, uint32_t *segments)
{
    uint32_t used = 0, count = 0;

    *segments = 0;
    while (want != 0 && count < CHAINS_MAX && used <= AV_VSOCK_SEGMENTS_MAX) {
        struct iovec *iov = vsock->iov + used;
        struct av_chain chain;
        uint32_t skip = AV_VSOCK_HEADER_BYTES;
        int result = av_vring_pop(vsock->rx, &chain, iov, AV_VSOCK_SEGMENTS_MAX);

        /* A broken one is met again by the next call. */
        if (result <= 0)
            return count != 0 ? (int)count : result;
        if (chain.writable_bytes < AV_VSOCK_HEADER_BYTES + 1)
            return av_vsock_refuse(vsock->rx);
        room[count] = (struct room){ .head = chain.head, .first = used + chain.readable };
        room[count].bytes = chain.writable_bytes - AV_VSOCK_HEADER_BYTES;
        if (room[count].bytes > want)
            room[count].bytes = want;
        want -= room[count].bytes;
        for (uint32_t i = 0, left = room[count].bytes; left != 0; i++) {
            struct iovec piece = iov[chain.readable + i];

            if (piece.iov_len <= skip) {
                skip -= (uint32_t)piece.iov_len;
                continue;
            }
            piece.iov_base = (uint8_t *)piece.iov_base + skip;
            piece.iov_len -= skip;
            skip = 0;
            if (piece.iov_len > left)
                piece.iov_len = left;
            left -= (uint32_t)piece.iov_len;
            vsock->payload[(*segments)++] = piece;
        }
        used += (uint32_t)chain.readable + chain.writable;
        count++;
    }
    return (int)count;
}

/* Give back the buffers that `bytes` fill, each a packet, and leave the others in the ring. */
static void give_back(struct av_vsock *vsock, const struct av_vsock_connection *connection,
                      const struct room *room, uint32_t count, uint32_t bytes)
{
    struct av_vsock_header header = header_of(vsock, connection, AV_VSOCK_OP_RW);
    uint32_t filled = 0;

    for (uint32_t left = bytes; left != 0; left -= header.len) {
        const struct room *at = &room[filled++];

        header.len = left < at->bytes ? left : at->bytes;
        av_vsock_scatter(vsock->iov + at->first, &header, sizeof(header));
        av_vring_push(vsock->rx, at->head, AV_VSOCK_HEADER_BYTES + header.len);
    }
    for (; filled < count; filled++)
        av_vring_unpop(vsock->rx);
}

static void on_end(struct av_vsock *vsock, struct av_vsock_connection *connection, bool gone)
{
    /* By now it would be a hang-up, whose event may come later. */
    if (av_vsock_is_aborted(connection)) {
        av_vsock_kill(vsock, connection, AV_VSOCK_NOT_SAID);
        return;
    }
    connection->has_eof = true;
    av_vsock_shut(vsock, connection, gone ? AV_VSOCK_SHUT_BOTH : AV_VSOCK_SHUT_SEND);
}

/* Behind walls no flag tells of descriptors; a socket that both ends have a fate of carries none. */
static ssize_t receive(const struct av_vsock *vsock, const struct av_vsock_connection *connection,
                       struct msghdr *message)
{
    ssize_t got;

    if (!vsock->walled)
        return recvmsg(connection->fd, message, MSG_DONTWAIT);
    got = readv(connection->fd, message->msg_iov, (int)message->msg_iovlen);
    message->msg_flags = connection->fate == NULL ? MSG_CTRUNC : 0;
    return got;
}

/* Move one slice from the socket to the guest; how many bytes, -EAGAIN no room, or -EPROTO. */
static int64_t move(struct av_vsock *vsock, struct av_vsock_connection *connection)
{
    struct room room[CHAINS_MAX];
    struct msghdr message = { .msg_iov = vsock->payload };
    uint32_t want = credit(connection), asked = 0, segments;
    ssize_t got;
    int count;

    if (want > AV_VSOCK_SLICE_BYTES)
        want = AV_VSOCK_SLICE_BYTES;
    count = take_room(vsock, room, want, &segments);
    if (count <= 0)
        return count == 0 ? -EAGAIN : count;
    message.msg_iovlen = segments;
    for (int i = 0; i < count; i++)
        asked += room[i].bytes;
    got = receive(vsock, connection, &message);
    if (got <= 0) {
        int error = got == 0 ? 0 : errno;

        give_back(vsock, connection, room, (uint32_t)count, 0);
        connection->readable = false;
        if (error != EAGAIN)
            on_end(vsock, connection, connection->hung_up || error != 0);
        return 0;
    }
    give_back(vsock, connection, room, (uint32_t)count, (uint32_t)got);
    /* Less than there was room for: it is empty, and an event will tell of more. Not so before an
     * end, which has had its event, or behind descriptors, which end what one read gives. */
    if ((uint32_t)got < asked && !connection->ends && !(message.msg_flags & MSG_CTRUNC))
        connection->readable = false;
    vsock->rx_urgent = vsock->python_first = true;
    connection->sent += (uint32_t)got;
    if (connection->deadline_ns != 0)
        av_vsock_wait(vsock, connection, vsock->setup.close_ns); /* it takes what is left */
    vsock->stats.tx_bytes += (uint64_t)got;
    told(connection);
    return got;
}

/* Send what is due of it. How many bytes, -EAGAIN no room, or -EPROTO. It may be gone then, unless
 * there was no room. */
static int64_t serve(struct av_vsock *vsock, struct av_vsock_connection *connection)
{
    static const struct {
        uint32_t due;
        enum av_vsock_op op;
    } openings[] = { { AV_VSOCK_DUE_REQUEST, AV_VSOCK_OP_REQUEST },
                     { AV_VSOCK_DUE_RESPONSE, AV_VSOCK_OP_RESPONSE } },
      endings[] = { { AV_VSOCK_DUE_SHUTDOWN, AV_VSOCK_OP_SHUTDOWN },
                    { AV_VSOCK_DUE_CREDIT, AV_VSOCK_OP_CREDIT_UPDATE } };
    int64_t moved = 0;
    int result;

    if (connection->due & AV_VSOCK_DUE_RST) {
        result = put(vsock, connection, AV_VSOCK_DUE_RST, AV_VSOCK_OP_RST);
        if (result < 0)
            return result;
        av_vsock_bury(vsock, connection);
        return 0;
    }
    for (uint32_t i = 0; i < 2; i++)
        if ((connection->due & openings[i].due) &&
            (result = put(vsock, connection, openings[i].due, openings[i].op)) < 0)
            return result;
    if (av_vsock_can_read(connection) && (moved = move(vsock, connection)) < 0)
        return moved;
    for (uint32_t i = 0; i < 2; i++)
        if ((connection->due & endings[i].due) &&
            (result = put(vsock, connection, endings[i].due, endings[i].op)) < 0)
            return result;
    av_vsock_wake(vsock, connection);
    return moved;
}

int av_vsock_deliver(struct av_vsock *vsock)
{
    struct av_vsock_link *ready = &vsock->ready;
    uint32_t turns = BUDGET_TURNS;
    int64_t left = BUDGET_BYTES, moved = 0;

    vsock->rx_starved = false;
    while (ready->next != ready && left > 0 && turns-- != 0) {
        struct av_vsock_link *first = ready->next;

        av_vsock_unlink(first);
        moved = serve(vsock, (struct av_vsock_connection *)first);
        if (moved < 0) {
            if (!av_vsock_is_linked(first))
                av_vsock_link_after(ready, first);
            vsock->rx_starved = moved == -EAGAIN;
            break;
        }
        left -= moved;
        /* The guest takes this slice while the next one is copied. */
        if (moved != 0)
            av_vsock_announce_rx(vsock);
    }
    av_vsock_announce_rx(vsock);
    if (moved < 0)
        return moved == -EAGAIN ? 0 : (int)moved;
    return ready->next != ready;
}
