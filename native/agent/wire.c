/* Frames as a worker sends and receives them: one after the other, waiting. */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

enum { ERROR_TEXT_MAX = 512, ROOM = 2 * (sizeof(struct av_head) + AV_FRAME_MAX) };

enum av_upload av_wire_upload;
void (*av_wire_clean)(void);

static int connection = -1;
static unsigned char room[ROOM];
static size_t at, end;

static void leave(void)
{
    if (av_wire_clean)
        av_wire_clean();
    _exit(1);
}

static void terminated(int sig)
{
    (void)sig;
    leave();
}

void av_wire_begin(int fd, const struct av_buffer *early)
{
    struct sigaction action = {.sa_handler = terminated};

    connection = fd;
    at = 0;
    end = early->end - early->at;
    if (end > sizeof room)
        leave();
    memcpy(room, early->bytes + early->at, end);
    sigaction(SIGTERM, &action, NULL);
}

void av_wire_send(enum av_type type, const void *payload, size_t size)
{
    struct av_head head = {.size = (uint32_t)size, .type = (uint8_t)type};
    struct iovec parts[] = {{&head, sizeof head}, {(void *)(uintptr_t)payload, size}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    size_t left = sizeof head + size;

    while (left > 0) {
        ssize_t n = sendmsg(connection, &message, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            leave();
        left -= (size_t)n;
        for (int i = 0; i < 2 && n > 0; i++) { /* what is empty has no address to move on */
            size_t part = (size_t)n < parts[i].iov_len ? (size_t)n : parts[i].iov_len;
            parts[i].iov_base = (char *)parts[i].iov_base + part;
            parts[i].iov_len -= part;
            n -= (ssize_t)part;
        }
    }
}

static void need(size_t bytes)
{
    if (at + bytes > sizeof room) {
        memmove(room, room + at, end - at);
        end -= at;
        at = 0;
    }
    while (end - at < bytes) {
        ssize_t n = recv(connection, room + end, sizeof room - end, 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            leave();
        end += (size_t)n;
    }
}

uint8_t av_wire_receive(unsigned char **payload, size_t *size)
{
    struct av_head head;

    if (at == end)
        at = end = 0;
    need(sizeof head);
    memcpy(&head, room + at, sizeof head);
    if (head.size > AV_FRAME_MAX || head.zero[0] || head.zero[1] || head.zero[2])
        leave();
    need(sizeof head + head.size);
    *payload = room + at + sizeof head;
    *size = head.size;
    at += sizeof head + head.size;
    return head.type;
}

void av_wire_ok(void)
{
    av_wire_send(AV_OK, NULL, 0);
}

void av_wire_fail(int error, const char *what)
{
    unsigned char bytes[4 + ERROR_TEXT_MAX], *payload;
    size_t size = strnlen(what, ERROR_TEXT_MAX);
    uint32_t number = (uint32_t)error;

    if (av_wire_clean)
        av_wire_clean();
    memcpy(bytes, &number, 4);
    memcpy(bytes + 4, what, size);
    av_wire_send(AV_ERROR, bytes, 4 + size);
    if (av_wire_upload == AV_UPLOADING)
        while (av_wire_receive(&payload, &size) == AV_DATA)
            ;
    if (av_wire_upload != AV_NO_UPLOAD)
        av_wire_send(AV_END, NULL, 0); /* only now is the connection free for another request */
    _exit(0);
}
