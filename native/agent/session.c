/* One connection: frames in and out, and whose they are. */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { READ_BYTES = 64 * 1024, ERROR_TEXT_MAX = 512 };

bool av_buffer_append(struct av_buffer *buffer, const void *bytes, size_t size)
{
    size_t used = buffer->end - buffer->at;

    if (buffer->at) {
        memmove(buffer->bytes, buffer->bytes + buffer->at, used);
        buffer->at = 0;
        buffer->end = used;
    }
    if (used + size > buffer->capacity) {
        size_t capacity = buffer->capacity ? buffer->capacity : 4096;
        while (capacity < used + size)
            capacity *= 2;
        void *larger = realloc(buffer->bytes, capacity);
        if (!larger)
            return false;
        buffer->bytes = larger;
        buffer->capacity = capacity;
    }
    if (size)
        memcpy(buffer->bytes + used, bytes, size);
    buffer->end = used + size;
    return true;
}

void av_buffer_free(struct av_buffer *buffer)
{
    free(buffer->bytes);
    *buffer = (struct av_buffer){0};
}

/* --- sending -------------------------------------------------------------------------- */

/* What the session waits for: room for what it has to say; what the client says, unless it does
 * not listen itself or a worker has the connection; and the client's leaving. */
static void watch_connection(struct av_session *s)
{
    size_t unsent = s->out.end - s->out.at;
    uint32_t events = EPOLLRDHUP;

    if (unsent)
        events |= EPOLLOUT;
    if (s->state != AV_WORKING && unsent < AV_UNSENT_MAX)
        events |= EPOLLIN;
    if (s->state != AV_DEAD && av_watch_set(&s->connection, events) < 0)
        av_session_end(s);
}

void av_session_flush(struct av_session *s)
{
    if (s->state == AV_DEAD || s->state == AV_WORKING)
        return;
    while (s->out.end > s->out.at) {
        ssize_t n = send(s->connection.fd, s->out.bytes + s->out.at, s->out.end - s->out.at,
                         MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno != EAGAIN) {
            av_session_end(s);
            return;
        }
        if (n < 0)
            break;
        s->out.at += (size_t)n;
    }
    if (s->out.at == s->out.end)
        s->out.at = s->out.end = 0;
    watch_connection(s);
    if (s->state == AV_RUNNING)
        av_command_sent(s);
}

void av_send(struct av_session *s, enum av_type type, const void *payload, size_t size)
{
    struct av_head head = {.size = (uint32_t)size, .type = (uint8_t)type};

    if (s->state == AV_DEAD)
        return;
    if (!av_buffer_append(&s->out, &head, sizeof head) ||
        !av_buffer_append(&s->out, payload, size))
        av_session_end(s);
    else if (s->out.end - s->out.at >= AV_UNSENT_MAX)
        av_session_flush(s);
    else
        av_loop_unsent();
}

void av_send_error(struct av_session *s, int error, const char *what)
{
    char bytes[4 + ERROR_TEXT_MAX];
    size_t size = strnlen(what, ERROR_TEXT_MAX);
    uint32_t number = (uint32_t)error;

    memcpy(bytes, &number, 4);
    memcpy(bytes + 4, what, size);
    av_send(s, AV_ERROR, bytes, 4 + size);
}

/* --- requests ------------------------------------------------------------------------- */

static void greet(struct av_session *s, uint8_t type, const unsigned char *payload, size_t size)
{
    struct av_hello hello = {.magic = AV_MAGIC, .version = AV_VERSION}, theirs;

    if (type != AV_HELLO || size != sizeof theirs) {
        av_session_end(s);
        return;
    }
    memcpy(&theirs, payload, sizeof theirs);
    if (s->surplus) { /* closing would take the answer back; it leaves by itself */
        s->state = AV_REFUSED;
        av_send_error(s, EAGAIN, "too many connections");
        return;
    }
    av_send(s, AV_HELLO, &hello, sizeof hello);
    if (!memcmp(theirs.magic, AV_MAGIC, 4) && theirs.version == AV_VERSION) {
        s->state = AV_IDLE;
    } else { /* it is told which version this is */
        av_session_flush(s);
        av_session_end(s);
    }
}

static void ping(struct av_session *s)
{
    struct timespec now;
    struct av_clock reply = {0};

    clock_gettime(CLOCK_REALTIME, &now);
    reply.seconds = now.tv_sec;
    reply.nanoseconds = (uint32_t)now.tv_nsec;
    av_send(s, AV_OK, &reply, sizeof reply);
}

static void set_clock(struct av_session *s, const unsigned char *payload, size_t size)
{
    struct av_clock wanted;
    struct timespec time;

    if (size != sizeof wanted) {
        av_session_end(s);
        return;
    }
    memcpy(&wanted, payload, sizeof wanted);
    time.tv_sec = wanted.seconds;
    time.tv_nsec = wanted.nanoseconds;
    if (clock_settime(CLOCK_REALTIME, &time) < 0)
        av_send_error(s, errno, "clock");
    else
        av_send(s, AV_OK, NULL, 0);
}

static void request(struct av_session *s, uint8_t type, unsigned char *payload, size_t size)
{
    switch (type) {
    case AV_STDIN: /* what was on its way when the last command ended */
    case AV_WINDOW:
    case AV_SIGNAL:
    case AV_RESIZE:
        return;
    case AV_PING:
        ping(s);
        return;
    case AV_SET_CLOCK:
        set_clock(s, payload, size);
        return;
    case AV_EXEC:
        av_command_start(s, payload, size);
        return;
    case AV_SHUTDOWN:
    case AV_READ:
    case AV_WRITE:
    case AV_LIST:
    case AV_STAT:
    case AV_MKDIR:
    case AV_REMOVE:
    case AV_RENAME:
    case AV_CHMOD:
        av_worker_start(s, type, payload, size);
        return;
    default:
        av_session_end(s);
    }
}

static void frame(struct av_session *s, uint8_t type, unsigned char *payload, size_t size)
{
    switch (s->state) {
    case AV_GREETING:
        greet(s, type, payload, size);
        break;
    case AV_IDLE:
        request(s, type, payload, size);
        break;
    case AV_RUNNING:
        if (!av_command_frame(s, type, payload, size))
            av_session_end(s);
        break;
    case AV_WORKING:
    case AV_REFUSED:
    case AV_DEAD:
        break;
    }
}

/* Serves each whole frame that is there. A worker takes over what comes behind its request. */
static void frames(struct av_session *s)
{
    struct av_head head;

    while (s->state != AV_DEAD && s->state != AV_WORKING &&
           s->in.end - s->in.at >= sizeof head) {
        memcpy(&head, s->in.bytes + s->in.at, sizeof head);
        if (head.size > AV_FRAME_MAX || head.zero[0] || head.zero[1] || head.zero[2]) {
            av_session_end(s);
            return;
        }
        if (s->in.end - s->in.at < sizeof head + head.size)
            return;
        s->in.at += sizeof head + head.size;
        frame(s, head.type, s->in.bytes + s->in.at - head.size, head.size);
    }
    if (s->in.at == s->in.end && s->in.capacity > READ_BYTES)
        av_buffer_free(&s->in);
}

static void readable(struct av_session *s)
{
    static unsigned char bytes[READ_BYTES];
    ssize_t n = recv(s->connection.fd, bytes, sizeof bytes, 0);

    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0 || !av_buffer_append(&s->in, bytes, (size_t)n))
        av_session_end(s);
    else
        frames(s);
}

static void connection_ready(struct av_watch *watch, uint32_t events)
{
    struct av_session *s = watch->session;

    if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) {
        av_session_end(s);
        return;
    }
    if (events & EPOLLOUT)
        av_session_flush(s);
    if (events & EPOLLIN && s->state != AV_DEAD && s->state != AV_WORKING)
        readable(s);
}

/* --- life ----------------------------------------------------------------------------- */

struct av_session *av_session_create(int fd)
{
    struct av_session *s = calloc(1, sizeof *s);

    if (!s)
        return NULL;
    s->connection = (struct av_watch){.fd = fd, .ready = connection_ready, .session = s};
    s->command.in.fd = s->command.out.fd = s->command.err.fd = -1;
    if (av_watch_set(&s->connection, EPOLLIN | EPOLLRDHUP) < 0) {
        free(s);
        return NULL;
    }
    return s;
}

/* Ends the client's command or worker with it; the memory goes at the end of the loop's turn. */
void av_session_end(struct av_session *s)
{
    if (s->state == AV_DEAD)
        return;
    s->state = AV_DEAD;
    av_command_end(s);
    if (s->worker > 0 && !s->lasting)
        kill(s->worker, SIGTERM);
    s->worker = 0;
    av_watch_close(&s->connection);
    av_buffer_free(&s->in);
    av_buffer_free(&s->out);
}

void av_session_idle(struct av_session *s)
{
    if (s->state == AV_DEAD)
        return;
    s->state = AV_IDLE;
    watch_connection(s);
}

void av_session_child(struct av_session *s, pid_t pid, int status)
{
    if (s->command.pid == pid) {
        av_command_child(s, status);
        return;
    }
    s->worker = 0;
    s->lasting = false;
    if (status != 0) { /* it may have stopped in the middle of a frame */
        av_session_end(s);
        return;
    }
    av_buffer_free(&s->in); /* the worker has had it */
    fcntl(s->connection.fd, F_SETFL, O_RDWR | O_NONBLOCK);
    av_session_idle(s);
}
