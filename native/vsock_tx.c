/* From the guest: its packets, and what goes on from them to sockets. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "vsock_internal.h"

#define BUDGET_PACKETS 256u /* a run */
#define BUDGET_BYTES (1024u * 1024)
#define OK_BYTES_MAX 16u

/* One packet of the guest's: its header, copied once, and where its payload is. */
struct packet {
    struct av_vsock_header header;
    struct iovec *payload;
    uint32_t segments;
};

/* --- to a socket ----------------------------------------------------------------------- */

static ssize_t send_to(const struct av_vsock *vsock, int fd, struct iovec *iov, uint32_t count)
{
    struct msghdr message = { .msg_iov = iov, .msg_iovlen = count };

    if (vsock->walled)
        return writev(fd, iov, (int)count); /* Python ignores SIGPIPE */
    return sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static void watch(struct av_vsock *vsock, struct av_vsock_connection *connection, bool writable)
{
    struct epoll_event event = { .events = EPOLLIN | EPOLLRDHUP | EPOLLET,
                                 .data.ptr = connection };

    /* Only when it is full: else there would be an event each time that the program reads. */
    if (connection->wants_write == writable)
        return;
    if (writable)
        event.events |= EPOLLOUT;
    connection->wants_write = writable;
    epoll_ctl(vsock->sockets_fd, EPOLL_CTL_MOD, connection->fd, &event);
}

/* So much of what the guest sent needs no more room. */
static void forward(struct av_vsock *vsock, struct av_vsock_connection *connection, uint32_t bytes)
{
    connection->forwarded += bytes;
    if (connection->forwarded - connection->told >= AV_VSOCK_UPDATE_BYTES &&
        connection->state == AV_VSOCK_OPEN) {
        connection->due |= AV_VSOCK_DUE_CREDIT;
        av_vsock_wake(vsock, connection);
    }
}

/* The program takes nothing more. */
static void deafen(struct av_vsock *vsock, struct av_vsock_connection *connection)
{
    uint32_t held = connection->held;

    connection->deaf = true;
    connection->held = 0;
    watch(vsock, connection, false);
    forward(vsock, connection, held);
    av_vsock_shut(vsock, connection, AV_VSOCK_SHUT_RECEIVE);
}

/* Keep what the socket has no room for. False: there is no memory. */
static bool hold(struct av_vsock_connection *connection, struct iovec *from, uint32_t bytes)
{
    uint32_t need = connection->held + bytes, room = connection->buffer_bytes;
    uint8_t *buffer;

    if (need > room) {
        for (room = room == 0 ? 4096 : room; room < need;)
            room *= 2;
        buffer = malloc(room);
        if (buffer == NULL)
            return false;
        if (connection->held != 0)
            memcpy(buffer, connection->buffer + connection->held_at, connection->held);
        free(connection->buffer);
        connection->buffer = buffer;
        connection->buffer_bytes = room;
        connection->held_at = 0;
    } else if (connection->held_at + need > room) {
        memmove(connection->buffer, connection->buffer + connection->held_at, connection->held);
        connection->held_at = 0;
    }
    av_vsock_gather(from, connection->buffer + connection->held_at + connection->held, bytes);
    connection->held = need;
    return true;
}

/* Skip what went of these segments. */
static struct iovec *skip(struct iovec *iov, size_t bytes)
{
    while (bytes != 0 && bytes >= iov->iov_len)
        bytes -= iov++->iov_len;
    if (bytes != 0) {
        iov->iov_base = (uint8_t *)iov->iov_base + bytes;
        iov->iov_len -= bytes;
    }
    return iov;
}

static void pass_on(struct av_vsock *vsock, struct av_vsock_connection *connection,
                    struct packet *packet)
{
    uint32_t bytes = packet->header.len;
    ssize_t sent = 0;

    if (!connection->deaf && connection->held == 0) {
        sent = send_to(vsock, connection->fd, packet->payload, packet->segments);
        if (sent < 0 && errno != EAGAIN && errno != ENOBUFS)
            deafen(vsock, connection);
        if (sent < 0)
            sent = 0;
    }
    if (connection->deaf)
        sent = bytes;
    if (sent != bytes) {
        if (!hold(connection, skip(packet->payload, (size_t)sent), bytes - (uint32_t)sent)) {
            av_vsock_kill(vsock, connection, AV_VSOCK_NO_MEMORY);
            return;
        }
        watch(vsock, connection, true);
    }
    forward(vsock, connection, (uint32_t)sent);
}

/* All that the guest sent has gone to the socket, and the guest sends no more. */
static void finish(struct av_vsock *vsock, struct av_vsock_connection *connection)
{
    if (connection->state == AV_VSOCK_DRAINING || connection->state == AV_VSOCK_DEAD)
        av_vsock_tell_fate(connection, AV_VSOCK_ENDED | AV_VSOCK_CLOSED);
    if (connection->state == AV_VSOCK_DRAINING) {
        av_vsock_free(vsock, connection);
    } else if (connection->state == AV_VSOCK_DEAD) {
        av_vsock_close(vsock, connection); /* whether the guest takes its reset or not */
    } else if ((connection->guest_shut & AV_VSOCK_SHUT_SEND) && connection->fd >= 0 &&
               connection->state == AV_VSOCK_OPEN) {
        av_vsock_tell_fate(connection, AV_VSOCK_ENDED);
        shutdown(connection->fd, SHUT_WR);
    }
}

void av_vsock_drain(struct av_vsock *vsock, struct av_vsock_connection *connection)
{
    while (connection->held != 0) {
        struct iovec iov = { .iov_base = connection->buffer + connection->held_at,
                             .iov_len = connection->held };
        ssize_t sent = send_to(vsock, connection->fd, &iov, 1);

        if (sent < 0 && (errno == EAGAIN || errno == ENOBUFS))
            return;
        if (sent < 0) {
            deafen(vsock, connection);
            break;
        }
        connection->held -= (uint32_t)sent;
        connection->held_at += (uint32_t)sent;
        forward(vsock, connection, (uint32_t)sent);
    }
    if (connection->fd < 0)
        return; /* it has closed */
    watch(vsock, connection, false);
    free(connection->buffer);
    connection->buffer = NULL;
    connection->held_at = connection->buffer_bytes = 0;
    finish(vsock, connection);
}

/* --- packets of a spliced connection --------------------------------------------------- */

/* Its counters; false when it has read more than it was sent, or less than before. */
static bool hear(struct av_vsock_connection *connection, const struct av_vsock_header *header)
{
    uint32_t ahead = header->fwd_cnt - connection->guest_forwarded;

    if (ahead > connection->sent - connection->guest_forwarded)
        return false;
    connection->guest_forwarded = header->fwd_cnt;
    connection->guest_alloc = header->buf_alloc;
    return true;
}

static void on_data(struct av_vsock *vsock, struct av_vsock_connection *connection,
                    struct packet *packet)
{
    uint32_t bytes = packet->header.len;

    if (connection->state == AV_VSOCK_CLOSING)
        return; /* on its way when we closed */
    if (connection->state != AV_VSOCK_OPEN || (connection->guest_shut & AV_VSOCK_SHUT_SEND)) {
        av_vsock_kill(vsock, connection, AV_VSOCK_BAD_DATA);
        return;
    }
    if (bytes > AV_VSOCK_BUFFER_BYTES - (connection->received - connection->forwarded)) {
        av_vsock_kill(vsock, connection, AV_VSOCK_NO_ROOM);
        return;
    }
    connection->received += bytes;
    if (bytes != 0)
        pass_on(vsock, connection, packet);
}

static void on_shutdown(struct av_vsock *vsock, struct av_vsock_connection *connection,
                        uint32_t flags)
{
    uint32_t fresh = flags & ~connection->guest_shut;

    if (connection->state != AV_VSOCK_OPEN && connection->state != AV_VSOCK_CLOSING) {
        av_vsock_kill(vsock, connection, AV_VSOCK_BAD_SHUTDOWN);
        return;
    }
    connection->guest_shut |= flags;
    if (connection->guest_shut == AV_VSOCK_SHUT_BOTH) {
        /* The guest has closed, and waits for this answer. What the program has not read yet
         * stays for it. */
        if (connection->held == 0) {
            av_vsock_tell_fate(connection, AV_VSOCK_ENDED | AV_VSOCK_CLOSED);
            av_vsock_close(vsock, connection);
        } else if (vsock->unread == vsock->setup.unread_max) {
            av_vsock_kill(vsock, connection, AV_VSOCK_UNREAD);
            return;
        } else {
            connection->unread = true;
            vsock->unread++;
        }
        av_vsock_wait(vsock, connection, 0);
        connection->state = AV_VSOCK_DEAD;
        connection->due = AV_VSOCK_DUE_RST;
        av_vsock_wake(vsock, connection);
        return;
    }
    if (connection->state != AV_VSOCK_OPEN)
        return;
    if (fresh & AV_VSOCK_SHUT_RECEIVE)
        shutdown(connection->fd, SHUT_RD);
    if ((fresh & AV_VSOCK_SHUT_SEND) && connection->held == 0)
        finish(vsock, connection);
}

static void on_response(struct av_vsock *vsock, struct av_vsock_connection *connection)
{
    char text[OK_BYTES_MAX];
    int bytes = snprintf(text, sizeof(text), "OK %u\n", connection->host_port);
    struct iovec iov = { .iov_base = text, .iov_len = (size_t)bytes };

    av_vsock_wait(vsock, connection, 0);
    connection->state = AV_VSOCK_OPEN;
    vsock->stats.opened++;
    if (send_to(vsock, connection->fd, &iov, 1) != bytes)
        /* Nothing else is in its way: the program has gone. */
        av_vsock_kill(vsock, connection, AV_VSOCK_NOT_SAID);
}

static void on_reset(struct av_vsock *vsock, struct av_vsock_connection *connection)
{
    if (connection->state == AV_VSOCK_DEAD) {
        av_vsock_bury(vsock, connection); /* it did not wait for ours */
        return;
    }
    if (connection->state == AV_VSOCK_ASKED) {
        vsock->stats.refused++;
        av_vsock_tell_fate(connection, AV_VSOCK_REFUSED);
    }
    av_vsock_tell_reason(connection, AV_VSOCK_GUEST_RESET);
    av_vsock_free(vsock, connection);
}

/* A broken packet ends its connection. */
static void receive(struct av_vsock *vsock, struct av_vsock_connection *connection,
                    struct packet *packet)
{
    const struct av_vsock_header *header = &packet->header;

    if (header->op == AV_VSOCK_OP_RST) {
        on_reset(vsock, connection);
        return;
    }
    if (connection->state == AV_VSOCK_DEAD)
        return;
    if (connection->state == AV_VSOCK_ASKED && (connection->due & AV_VSOCK_DUE_REQUEST)) {
        /* It was not asked yet: nothing is left of it. */
        av_vsock_kill(vsock, connection, AV_VSOCK_BAD_OPERATION);
        return;
    }
    if (!hear(connection, header)) {
        av_vsock_kill(vsock, connection, AV_VSOCK_UNSENT);
    } else if (header->op == AV_VSOCK_OP_RW) {
        on_data(vsock, connection, packet);
    } else if (header->op == AV_VSOCK_OP_SHUTDOWN) {
        on_shutdown(vsock, connection, header->flags & AV_VSOCK_SHUT_BOTH);
    } else if (header->op == AV_VSOCK_OP_CREDIT_REQUEST) {
        connection->due |= AV_VSOCK_DUE_CREDIT;
    } else if (header->op == AV_VSOCK_OP_RESPONSE &&
               connection->state == AV_VSOCK_ASKED) {
        on_response(vsock, connection);
    } else if (header->op != AV_VSOCK_OP_CREDIT_UPDATE) {
        av_vsock_kill(vsock, connection, AV_VSOCK_BAD_OPERATION);
    }
    /* None of these frees what the guest knows of. There may be credit now. */
    av_vsock_wake(vsock, connection);
}

/* --- packets of nobody's --------------------------------------------------------------- */

static int open_socket(const struct av_vsock *vsock, uint32_t port)
{
    struct sockaddr_un at = { .sun_family = AF_UNIX };
    int bytes = snprintf(at.sun_path, sizeof(at.sun_path), "%s_%u", vsock->path, port), fd;

    if (bytes < 0 || bytes >= (int)sizeof(at.sun_path))
        return -1;
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    /* A unix socket is connected at once, or nobody listens or has time. */
    if (fd >= 0 && connect(fd, (struct sockaddr *)&at, sizeof(at)) < 0) {
        close(fd);
        return -1;
    }
    return fd;
}

/* The guest asks for a port. Whether a program of the host took it. */
static bool splice(struct av_vsock *vsock, const struct av_vsock_header *header)
{
    struct av_vsock_connection *connection;
    int fd;

    if (vsock->path == NULL || vsock->connections >= vsock->setup.connections_max ||
        av_vsock_serves(vsock, header->dst_port))
        return false;
    fd = open_socket(vsock, header->dst_port);
    if (fd < 0)
        return false;
    connection = av_vsock_new(vsock, AV_VSOCK_OPEN, fd, header->dst_port, header->src_port);
    if (connection == NULL) {
        close(fd);
        return false;
    }
    av_vsock_name(vsock, connection);
    vsock->stats.opened++;
    connection->guest_alloc = header->buf_alloc;
    connection->due = AV_VSOCK_DUE_RESPONSE;
    av_vsock_wake(vsock, connection);
    return true;
}

static void leave(struct av_vsock *vsock, struct packet *packet)
{
    struct av_vsock_inbox *inbox = vsock->inbox;

    memcpy(inbox->headers + (size_t)inbox->count * AV_VSOCK_HEADER_BYTES, &packet->header,
           AV_VSOCK_HEADER_BYTES);
    av_vsock_gather(packet->payload, inbox->data + inbox->bytes, packet->header.len);
    inbox->bytes += packet->header.len;
    if (inbox->count++ == 0)
        av_vsock_tell(vsock, AV_VSOCK_INBOX);
}

/* --- the ring -------------------------------------------------------------------------- */

/* The next packet. 1, 0 or -EPROTO: shorter than a header, or than its length. */
static int take(struct av_vsock *vsock, struct packet *packet, struct av_chain *chain)
{
    int result = av_vring_pop(vsock->tx, chain, vsock->iov, AV_VSOCK_SEGMENTS_MAX);

    if (result <= 0)
        return result;
    if (chain->readable_bytes < AV_VSOCK_HEADER_BYTES)
        return av_vsock_refuse(vsock->tx);
    packet->payload = av_vsock_gather(vsock->iov, &packet->header, AV_VSOCK_HEADER_BYTES);
    if (packet->header.len > chain->readable_bytes - AV_VSOCK_HEADER_BYTES)
        return av_vsock_refuse(vsock->tx);
    packet->segments = av_vsock_cut(packet->payload, packet->header.len);
    return 1;
}

/* Do what it asks for. False: it has to wait until the inbox has room. */
static bool dispatch(struct av_vsock *vsock, struct packet *packet)
{
    const struct av_vsock_header *header = &packet->header;
    struct av_vsock_connection *connection = NULL;
    bool is_spliced, ours = header->src_cid == vsock->setup.cid && header->dst_cid == AV_VSOCK_CID_HOST &&
                header->type == AV_VSOCK_TYPE_STREAM;

    if (ours)
        connection = av_vsock_find(vsock, header->dst_port, header->src_port);
    is_spliced = connection != NULL && connection->state != AV_VSOCK_PYTHONS;
    if (is_spliced) {
        receive(vsock, connection, packet);
    } else {
        if (vsock->inbox->count == AV_VSOCK_INBOX_PACKETS ||
            header->len > AV_VSOCK_BUFFER_BYTES - vsock->inbox->bytes)
            return false;
        is_spliced = ours && connection == NULL && header->op == AV_VSOCK_OP_REQUEST &&
                     splice(vsock, header);
        if (!is_spliced)
            leave(vsock, packet);
    }
    if (is_spliced) {
        vsock->stats.rx_packets++;
        vsock->stats.rx_bytes += header->len;
    }
    return true;
}

int av_vsock_transmit(struct av_vsock *vsock)
{
    uint32_t left = BUDGET_PACKETS, bytes = 0;
    struct packet packet;
    struct av_chain chain;
    int result = 0;

    vsock->tx_blocked = false;
    av_vring_kicks_off(vsock->tx);
    while (left != 0 && bytes < BUDGET_BYTES && (result = take(vsock, &packet, &chain)) > 0) {
        /* One that Python could never have taken: no driver may send so much at once. */
        if (packet.header.len > AV_VSOCK_BUFFER_BYTES) {
            result = av_vsock_refuse(vsock->tx);
            break;
        }
        if (!dispatch(vsock, &packet)) {
            av_vring_unpop(vsock->tx);
            vsock->tx_blocked = true;
            result = 0;
            break;
        }
        av_vring_push(vsock->tx, chain.head, 0);
        bytes += packet.header.len;
        left--;
    }
    av_vsock_announce_tx(vsock, BUDGET_PACKETS - left);
    return result;
}
