#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "vsock_internal.h"

/* --- names ----------------------------------------------------------------------------- */

/* A guest chooses ports: without the seed it could have all of its names in one bucket. */
static uint32_t bucket_of(const struct av_vsock *vsock, uint32_t host_port, uint32_t guest_port)
{
    uint64_t mixed = ((uint64_t)host_port << 32 | guest_port) ^ vsock->seed;

    mixed = (mixed ^ mixed >> 32) * 0xd6e8feb86659fd93u;
    mixed = (mixed ^ mixed >> 32) * (vsock->seed | 1);
    return (uint32_t)(mixed >> 40) % AV_VSOCK_BUCKETS;
}

struct av_vsock_connection *av_vsock_find(const struct av_vsock *vsock, uint32_t host_port,
                                          uint32_t guest_port)
{
    struct av_vsock_connection *at = vsock->bucket[bucket_of(vsock, host_port, guest_port)];

    while (at != NULL && (at->host_port != host_port || at->guest_port != guest_port))
        at = at->chain;
    return at;
}

void av_vsock_name(struct av_vsock *vsock, struct av_vsock_connection *connection)
{
    uint32_t bucket = bucket_of(vsock, connection->host_port, connection->guest_port);

    connection->chain = vsock->bucket[bucket];
    vsock->bucket[bucket] = connection;
    connection->named = true;
}

void av_vsock_unname(struct av_vsock *vsock, struct av_vsock_connection *connection)
{
    struct av_vsock_connection **at;

    if (!connection->named)
        return;
    at = &vsock->bucket[bucket_of(vsock, connection->host_port, connection->guest_port)];
    while (*at != connection)
        at = &(*at)->chain;
    *at = connection->chain;
    connection->named = false;
}

/* --- connections ----------------------------------------------------------------------- */

struct av_vsock_connection *av_vsock_new(struct av_vsock *vsock, enum av_vsock_state state, int fd,
                                         uint32_t host_port, uint32_t guest_port)
{
    struct av_vsock_connection *connection = calloc(1, sizeof(*connection));
    struct epoll_event event = { .events = EPOLLIN | EPOLLRDHUP | EPOLLET,
                                 .data.ptr = connection };

    if (connection == NULL)
        return NULL;
    if (fd >= 0 && epoll_ctl(vsock->sockets_fd, EPOLL_CTL_ADD, fd, &event) < 0) {
        free(connection);
        return NULL;
    }
    connection->state = state;
    connection->fd = fd;
    connection->host_port = host_port;
    connection->guest_port = guest_port;
    av_vsock_link_after(&vsock->all, &connection->all);
    vsock->connections++;
    return connection;
}

void av_vsock_close(struct av_vsock *vsock, struct av_vsock_connection *connection)
{
    if (connection->fd >= 0) {
        /* By hand: while a child that was forked just now has the socket too, close() leaves it
         * where it is watched, and events would come for a connection that is no more. */
        epoll_ctl(vsock->sockets_fd, EPOLL_CTL_DEL, connection->fd, NULL);
        av_vsock_tell_fate(connection, AV_VSOCK_SHUT);
        close(connection->fd);
    }
    connection->fd = -1;
    connection->readable = false;
    vsock->unread -= connection->unread;
    connection->unread = false;
    free(connection->buffer);
    connection->buffer = NULL;
    connection->held = connection->held_at = connection->buffer_bytes = 0;
}

void av_vsock_free(struct av_vsock *vsock, struct av_vsock_connection *connection)
{
    av_vsock_close(vsock, connection);
    av_vsock_tell_fate(connection, AV_VSOCK_GONE);
    av_vsock_unname(vsock, connection);
    av_vsock_wait(vsock, connection, 0);
    av_vsock_unlink(&connection->ready);
    av_vsock_unlink(&connection->all);
    vsock->connections--;
    free(connection);
}

void av_vsock_wait(struct av_vsock *vsock, struct av_vsock_connection *connection,
                   uint64_t limit_ns)
{
    bool waited = connection->deadline_ns != 0;

    connection->deadline_ns = limit_ns == 0 ? 0 : av_vsock_now_ns() + limit_ns;
    if (limit_ns != 0 && !waited && vsock->waiting++ == 0)
        av_vsock_tell(vsock, AV_VSOCK_TIMER);
    if (limit_ns == 0 && waited)
        vsock->waiting--;
}

void av_vsock_wake(struct av_vsock *vsock, struct av_vsock_connection *connection)
{
    if (!av_vsock_is_linked(&connection->ready) &&
        (connection->due != 0 || av_vsock_can_read(connection)))
        av_vsock_link_after(vsock->ready.prev, &connection->ready);
}

void av_vsock_bury(struct av_vsock *vsock, struct av_vsock_connection *connection)
{
    av_vsock_unname(vsock, connection);
    av_vsock_unlink(&connection->ready);
    connection->state = AV_VSOCK_DRAINING;
    connection->due = 0;
    if (connection->held == 0)
        av_vsock_free(vsock, connection);
}

void av_vsock_kill(struct av_vsock *vsock, struct av_vsock_connection *connection,
                   enum av_vsock_reason reason)
{
    bool unknown =
        connection->state == AV_VSOCK_ASKED && (connection->due & AV_VSOCK_DUE_REQUEST) != 0;

    av_vsock_tell_reason(connection, reason);
    av_vsock_close(vsock, connection);
    av_vsock_wait(vsock, connection, 0);
    if (unknown || connection->state == AV_VSOCK_DRAINING) {
        av_vsock_free(vsock, connection);
        return;
    }
    connection->state = AV_VSOCK_DEAD;
    connection->due = AV_VSOCK_DUE_RST;
    av_vsock_wake(vsock, connection);
}

void av_vsock_shut(struct av_vsock *vsock, struct av_vsock_connection *connection, uint32_t flags)
{
    if (connection->state != AV_VSOCK_OPEN)
        return;
    connection->shut |= flags;
    connection->due |= AV_VSOCK_DUE_SHUTDOWN;
    if (connection->shut == AV_VSOCK_SHUT_BOTH) {
        connection->state = AV_VSOCK_CLOSING;
        /* Its program may still be there: a socket that neither end writes to looks closed. */
        if ((connection->guest_shut & AV_VSOCK_SHUT_SEND) && connection->held == 0)
            av_vsock_tell_fate(connection, AV_VSOCK_CLOSED);
        av_vsock_close(vsock, connection);
        av_vsock_wait(vsock, connection, vsock->setup.close_ns);
    }
    av_vsock_wake(vsock, connection);
}

/* --- Python's part --------------------------------------------------------------------- */

/* Where a port is among Python's, or belongs. */
static uint32_t served_at(const struct av_vsock *vsock, uint32_t host_port)
{
    uint32_t low = 0, high = vsock->served_count;

    while (low < high) {
        uint32_t middle = (low + high) / 2;

        if (vsock->served[middle] < host_port)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

bool av_vsock_serves(const struct av_vsock *vsock, uint32_t host_port)
{
    uint32_t at = served_at(vsock, host_port);

    return at < vsock->served_count && vsock->served[at] == host_port;
}

static int add_served(struct av_vsock *vsock, uint32_t at, uint32_t host_port)
{
    uint32_t room = vsock->served_room == 0 ? 16 : vsock->served_room * 2;
    uint32_t *served;

    if (vsock->served_count == vsock->served_room) {
        served = realloc(vsock->served, room * sizeof(*served));
        if (served == NULL)
            return -ENOMEM;
        vsock->served = served;
        vsock->served_room = room;
    }
    memmove(vsock->served + at + 1, vsock->served + at,
            (vsock->served_count - at) * sizeof(*vsock->served));
    vsock->served[at] = host_port;
    vsock->served_count++;
    return 0;
}

int av_vsock_serve(struct av_vsock *vsock, uint32_t host_port, int serving)
{
    uint32_t at;
    int result = 0;

    av_lane_lock(&vsock->lane);
    at = served_at(vsock, host_port);
    if (serving && !av_vsock_serves(vsock, host_port)) {
        result = add_served(vsock, at, host_port);
    } else if (!serving && av_vsock_serves(vsock, host_port)) {
        vsock->served_count--;
        memmove(vsock->served + at, vsock->served + at + 1,
                (vsock->served_count - at) * sizeof(*vsock->served));
    }
    av_lane_unlock(&vsock->lane);
    return result;
}

static int claim(struct av_vsock *vsock, uint32_t host_port, uint32_t guest_port)
{
    struct av_vsock_connection *connection;

    if (av_vsock_find(vsock, host_port, guest_port) != NULL)
        return -EEXIST;
    if (vsock->connections >= vsock->setup.connections_max)
        return -ENOSPC;
    connection = av_vsock_new(vsock, AV_VSOCK_PYTHONS, -1, host_port, guest_port);
    if (connection == NULL)
        return -ENOMEM;
    av_vsock_name(vsock, connection);
    return 0;
}

int av_vsock_claim(struct av_vsock *vsock, uint32_t host_port, uint32_t guest_port)
{
    int result;

    av_lane_lock(&vsock->lane);
    result = claim(vsock, host_port, guest_port);
    av_lane_unlock(&vsock->lane);
    return result;
}

void av_vsock_release(struct av_vsock *vsock, uint32_t host_port, uint32_t guest_port)
{
    struct av_vsock_connection *connection;

    av_lane_lock(&vsock->lane);
    connection = av_vsock_find(vsock, host_port, guest_port);
    if (connection != NULL && connection->state == AV_VSOCK_PYTHONS)
        av_vsock_free(vsock, connection);
    av_lane_unlock(&vsock->lane);
}
