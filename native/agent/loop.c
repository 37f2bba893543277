/*
 * The epoll loop: new connections, ended children, and whatever sessions watch. What they say is
 * sent when nothing else is to be done: the end of a command is then one packet, not four.
 */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static int epoll_fd = -1;
static struct av_session *sessions[AV_SESSIONS_MAX + AV_SURPLUS_MAX];
static unsigned count;
static bool unsent;

enum { TURNS = 16 }; /* for how many events what is to be said may wait */

/* events: 0 for none at all, not even a hang-up, which epoll reports again and again; EPOLLERR
 * for that alone. 0 or -errno. */
int av_watch_set(struct av_watch *watch, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = watch};
    int op = !events ? EPOLL_CTL_DEL : watch->events ? EPOLL_CTL_MOD : EPOLL_CTL_ADD;

    if (watch->fd < 0 || watch->events == events)
        return 0;
    if (epoll_ctl(epoll_fd, op, watch->fd, &event) < 0)
        return -errno;
    watch->events = events;
    return 0;
}

void av_watch_close(struct av_watch *watch)
{
    if (watch->fd < 0)
        return;
    /* Not left to close(): a worker may still hold a copy of the descriptor. */
    av_watch_set(watch, 0);
    close(watch->fd);
    watch->fd = -1;
}

struct av_session *av_session_of(pid_t pid)
{
    for (unsigned i = 0; i < count; i++)
        if (sessions[i]->command.pid == pid || sessions[i]->worker == pid)
            return sessions[i];
    return NULL;
}

static void accept_all(struct av_watch *watch, uint32_t events)
{
    int fd;

    (void)events;
    while ((fd = accept4(watch->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)) >= 0) {
        bool room = count < AV_SESSIONS_MAX + AV_SURPLUS_MAX;
        struct av_session *session = room ? av_session_create(fd) : NULL;

        if (session) {
            session->surplus = count >= AV_SESSIONS_MAX;
            sessions[count++] = session;
        } else {
            close(fd);
        }
    }
}

static void reap(struct av_watch *watch, uint32_t events)
{
    struct signalfd_siginfo info;
    pid_t pid;
    int status;

    (void)events;
    while (read(watch->fd, &info, sizeof info) > 0)
        ;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        struct av_session *session = av_session_of(pid);
        if (session)
            av_session_child(session, pid, status);
    }
}

void av_loop_unsent(void)
{
    unsent = true;
}

static void flush_all(void)
{
    unsent = false;
    for (unsigned i = 0; i < count; i++)
        av_session_flush(sessions[i]);
}

static void sweep(void)
{
    for (unsigned i = 0; i < count;) {
        if (sessions[i]->state == AV_DEAD) {
            free(sessions[i]);
            sessions[i] = sessions[--count];
        } else {
            i++;
        }
    }
}

void av_loop(int listener, int signals)
{
    struct av_watch connections = {.fd = listener, .ready = accept_all};
    struct av_watch children = {.fd = signals, .ready = reap};
    struct epoll_event event;
    int n, turns = 0;

    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (epoll_fd < 0 || av_watch_set(&connections, EPOLLIN) < 0 ||
        av_watch_set(&children, EPOLLIN) < 0)
        abort();
    for (;;) {
        /* One at a time: serving one may end what the next of a batch would be about. */
        n = epoll_wait(epoll_fd, &event, 1, unsent ? 0 : -1);
        if (n > 0) {
            struct av_watch *watch = event.data.ptr;
            watch->ready(watch, event.events);
        }
        if (n == 0 || (unsent && ++turns >= TURNS)) {
            flush_all();
            turns = 0;
        }
        sweep();
    }
}
