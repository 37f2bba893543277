/* Processes for requests that may block, on a file system or by taking long. */
#define _GNU_SOURCE
#include "agent.h"

#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

static void close_others(unsigned kept)
{
    if ((kept > 3 && syscall(SYS_close_range, 3, kept - 1, 0) < 0) ||
        syscall(SYS_close_range, kept + 1, ~0U, 0) < 0)
        for (unsigned fd = 3; fd < 1024; fd++)
            if (fd != kept)
                close((int)fd);
}

/* The path and, for a rename, the other one: what stands behind the header. */
static const char *parse(const struct av_file *head, const unsigned char *payload, size_t size,
                         bool two, const char **other)
{
    const char *path = (const char *)payload + sizeof *head, *end = (const char *)payload + size;

    if (size <= sizeof *head || end[-1])
        return NULL;
    *other = path + strlen(path) + 1;
    if (!two)
        return *other == end ? path : NULL;
    return *other < end && *other + strlen(*other) + 1 == end ? path : NULL;
}

static void shut_down(const unsigned char *payload, size_t size)
{
    uint32_t reboot;

    if (size != sizeof reboot)
        _exit(1);
    memcpy(&reboot, payload, sizeof reboot);
    signal(SIGTERM, SIG_IGN);
    setsid();
    av_wire_ok();
    av_power_off(reboot);
}

/* One request for a file, its answers included. */
static void perform(uint8_t type, const unsigned char *payload, size_t size)
{
    struct av_file file;
    const char *other, *path = parse(&file, payload, size, type == AV_RENAME, &other);

    if (!path)
        _exit(1);
    memcpy(&file, payload, sizeof file);
    if (type == AV_READ)
        av_transfer_read(&file, path);
    else if (type == AV_WRITE)
        av_transfer_write(&file, path);
    else
        av_files_serve(type, &file, path, other);
}

static void serve_file(int fd, uint8_t type, const unsigned char *payload, size_t size)
{
    int root = av_root_open(), result;

    result = root < -1 ? root : av_root_enter(root);
    /* A copy of another connection would keep it open when the agent closes it. */
    close_others((unsigned)fd);
    if (result < 0)
        av_wire_fail(-result, "root");
    perform(type, payload, size);
}

static void end_with(pid_t agent)
{
    /* Or one that waits for a FIFO's other end would stay for ever. */
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != agent)
        _exit(1);
}

static void serve(struct av_session *s, pid_t agent, uint8_t type, const unsigned char *payload,
                  size_t size)
{
    int fd = s->connection.fd;
    sigset_t none;

    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK); /* the agent sets it again */
    av_wire_begin(fd, &s->in);
    if (type == AV_SHUTDOWN)
        shut_down(payload, size);
    end_with(agent);
    serve_file(fd, type, payload, size);
    _exit(0);
}

void av_worker_start(struct av_session *s, uint8_t type, unsigned char *payload, size_t size)
{
    pid_t pid, agent = getpid();

    /* What has been said goes first; a client that sends requests and does not listen to the
     * answers is none. */
    av_session_flush(s);
    if (s->out.end > s->out.at)
        av_session_end(s);
    if (s->state == AV_DEAD)
        return;
    pid = fork();
    if (pid == 0)
        serve(s, agent, type, payload, size);
    if (pid < 0) {
        av_session_end(s);
        return;
    }
    s->worker = pid;
    s->lasting = type == AV_SHUTDOWN;
    s->state = AV_WORKING;
    av_watch_set(&s->connection, EPOLLRDHUP);
}
