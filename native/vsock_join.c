/* Programs' sockets that are joined to the guest, and what their other ends are told. */
#include <errno.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "vsock_internal.h"

#define FIRST_PORT (1u << 30) /* of ours, and so many more */

_Static_assert(sizeof(struct av_vsock_fate) == 3, "as avmm/vsock/fates.py has it");

/* A byte has one writer. Its reader looks after the call to the kernel that tells it of an end, which
 * was made after the byte was written; release, so that it stays so. */
void av_vsock_tell_fate(struct av_vsock_connection *connection, uint8_t ends)
{
    struct av_vsock_fate *fate = connection->fate;

    if (fate != NULL)
        __atomic_store_n(&fate->lane, __atomic_load_n(&fate->lane, __ATOMIC_RELAXED) | ends,
                         __ATOMIC_RELEASE);
}

void av_vsock_tell_reason(struct av_vsock_connection *connection, enum av_vsock_reason reason)
{
    if (connection->fate != NULL && connection->fd >= 0)
        __atomic_store_n(&connection->fate->reason, (uint8_t)reason, __ATOMIC_RELEASE);
}

bool av_vsock_is_aborted(const struct av_vsock_connection *connection)
{
    return connection->fate != NULL &&
           (__atomic_load_n(&connection->fate->program, __ATOMIC_ACQUIRE) & AV_VSOCK_ABORTED);
}

/* One that has a fate says itself how long it waits, and where there is no driver its hang-up is not
 * looked at: expiry finds that. */
bool av_vsock_is_late(const struct av_vsock_connection *connection, uint64_t now_ns)
{
    if (connection->deadline_ns == 0)
        return false;
    if (connection->state == AV_VSOCK_ASKED && connection->fate != NULL)
        return av_vsock_is_aborted(connection);
    return connection->deadline_ns <= now_ns;
}

static int ask(struct av_vsock *vsock, int fd, uint32_t guest_port, struct av_vsock_fate *fate)
{
    struct av_vsock_connection *connection;
    uint32_t host_port;

    if (vsock->connections >= vsock->setup.connections_max)
        return -ENOSPC;
    do
        host_port = FIRST_PORT + vsock->next_port++ % FIRST_PORT;
    while (av_vsock_find(vsock, host_port, guest_port) != NULL);
    connection = av_vsock_new(vsock, AV_VSOCK_ASKED, fd, host_port, guest_port);
    if (connection == NULL)
        return -ENOMEM;
    connection->fate = fate;
    av_vsock_name(vsock, connection);
    av_vsock_wait(vsock, connection, vsock->setup.ask_ns);
    connection->due = AV_VSOCK_DUE_REQUEST;
    av_vsock_wake(vsock, connection);
    av_lane_wake(&vsock->lane);
    return 0;
}

int av_vsock_ask(struct av_vsock *vsock, int fd, uint32_t guest_port, struct av_vsock_fate *fate)
{
    int result;

    av_lane_lock(&vsock->lane);
    result = ask(vsock, fd, guest_port, fate);
    av_lane_unlock(&vsock->lane);
    if (result < 0)
        close(fd);
    return result;
}

static int accept_guest(struct av_vsock *vsock, int fd, uint32_t host_port, uint32_t guest_port,
                        uint32_t guest_alloc, struct av_vsock_fate *fate)
{
    struct av_vsock_connection *name = av_vsock_find(vsock, host_port, guest_port), *connection;

    if (name == NULL || name->state != AV_VSOCK_PYTHONS)
        return -ENOENT;
    connection = av_vsock_new(vsock, AV_VSOCK_OPEN, fd, host_port, guest_port);
    if (connection == NULL)
        return -ENOMEM;
    av_vsock_free(vsock, name);
    av_vsock_name(vsock, connection);
    vsock->stats.opened++;
    connection->fate = fate;
    connection->guest_alloc = guest_alloc;
    connection->due = AV_VSOCK_DUE_RESPONSE;
    av_vsock_wake(vsock, connection);
    av_lane_wake(&vsock->lane);
    return 0;
}

int av_vsock_accept(struct av_vsock *vsock, int fd, uint32_t host_port, uint32_t guest_port,
                    uint32_t guest_alloc, struct av_vsock_fate *fate)
{
    int result;

    av_lane_lock(&vsock->lane);
    result = accept_guest(vsock, fd, host_port, guest_port, guest_alloc, fate);
    av_lane_unlock(&vsock->lane);
    if (result < 0)
        close(fd);
    return result;
}
