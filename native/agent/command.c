/* A running command: its streams, with a window each, its signals and its end. */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

extern char **environ;

enum { CHUNK = 64 * 1024 };

static void watch_streams(struct av_session *s);

/* --- output --------------------------------------------------------------------------- */

static bool idle_output(const struct av_session *s)
{
    return s->command.pid == 0 && s->command.out.fd < 0 && s->command.err.fd < 0;
}

static void finish_if_over(struct av_session *s)
{
    if (s->state != AV_RUNNING || !idle_output(s))
        return;
    av_command_end(s);
    av_send(s, AV_END, NULL, 0);
    av_session_idle(s);
}

/* One chunk, no larger than the client's window: what it does not take stays in the pipe, and the
 * command waits. */
static void drain(struct av_session *s, struct av_watch *watch, enum av_type type)
{
    static unsigned char bytes[CHUNK];
    uint32_t *credit = &s->command.credit[type == AV_STDERR];
    ssize_t n;

    if (!*credit || s->out.end - s->out.at >= AV_UNSENT_MAX)
        return;
    n = read(watch->fd, bytes, *credit < CHUNK ? *credit : CHUNK);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n > 0) {
        *credit -= (uint32_t)n;
        av_send(s, type, bytes, (size_t)n);
    } else if (s->command.tty && s->command.pid) {
        /* EIO: it has closed its ends, but our closing the other one would kill it by SIGHUP. */
        s->command.hung = true;
    } else {
        av_watch_close(watch);
        av_send(s, type, NULL, 0);
        finish_if_over(s);
    }
}

/* --- input ---------------------------------------------------------------------------- */

static struct av_watch *input_of(struct av_command *c)
{
    return c->tty ? &c->out : &c->in;
}

/* The command takes no more. */
static void refuse_input(struct av_session *s)
{
    struct av_command *c = &s->command;

    av_buffer_free(&c->held);
    if (!c->in_ended)
        av_send(s, AV_STDIN, NULL, 0);
    c->in_ended = true;
    av_watch_close(&c->in);
}

static void end_input(struct av_command *c)
{
    struct termios settings;

    if (c->tty && c->out.fd >= 0 && tcgetattr(c->out.fd, &settings) == 0)
        (void)!write(c->out.fd, &settings.c_cc[VEOF], 1);
    av_watch_close(&c->in);
}

static void feed(struct av_session *s)
{
    struct av_command *c = &s->command;
    int fd = input_of(c)->fd;

    while (fd >= 0 && c->held.end > c->held.at) {
        ssize_t n = write(fd, c->held.bytes + c->held.at, c->held.end - c->held.at);
        if (n < 0 && errno == EAGAIN)
            break;
        if (n <= 0) {
            refuse_input(s);
            return;
        }
        c->held.at += (size_t)n;
        c->in_taken += (uint32_t)n;
    }
    if (c->in_ended && c->held.end == c->held.at)
        end_input(c);
    if (c->in_taken >= AV_STDIN_WINDOW / 2) {
        struct av_window window = {.stream = AV_STDIN, .bytes = c->in_taken};
        c->in_credit += c->in_taken;
        c->in_taken = 0;
        av_send(s, AV_WINDOW, &window, sizeof window);
    }
}

/* --- events --------------------------------------------------------------------------- */

static void watch_streams(struct av_session *s)
{
    struct av_command *c = &s->command;
    bool listening = s->out.end - s->out.at < AV_UNSENT_MAX, holding = c->held.end > c->held.at;
    uint32_t events = listening && c->credit[0] && !c->hung ? EPOLLIN : 0;

    if (s->state != AV_RUNNING)
        return;
    if (c->tty && holding)
        events |= EPOLLOUT;
    if (av_watch_set(&c->out, events) < 0 ||
        av_watch_set(&c->err, listening && c->credit[1] ? EPOLLIN : 0) < 0 ||
        av_watch_set(&c->in, holding ? EPOLLOUT : EPOLLERR) < 0)
        av_session_end(s);
}

static void out_ready(struct av_watch *watch, uint32_t events)
{
    struct av_session *s = watch->session;

    if (events & EPOLLOUT && s->command.tty)
        feed(s);
    if (events & ~(uint32_t)EPOLLOUT && watch->fd >= 0 && s->state == AV_RUNNING)
        drain(s, watch, AV_STDOUT);
    watch_streams(s);
}

static void err_ready(struct av_watch *watch, uint32_t events)
{
    (void)events;
    drain(watch->session, watch, AV_STDERR);
    watch_streams(watch->session);
}

static void in_ready(struct av_watch *watch, uint32_t events)
{
    struct av_session *s = watch->session;

    if (events & EPOLLERR)
        refuse_input(s);
    else
        feed(s);
    watch_streams(s);
}

void av_command_sent(struct av_session *s)
{
    watch_streams(s);
}

void av_command_child(struct av_session *s, int status)
{
    struct av_exited exited = {.how = AV_CODE, .value = (uint32_t)WEXITSTATUS(status)};

    if (WIFSIGNALED(status))
        exited = (struct av_exited){.how = AV_KILLED, .value = (uint32_t)WTERMSIG(status)};
    s->command.pid = 0;
    s->command.hung = false;
    av_send(s, AV_EXITED, &exited, sizeof exited);
    finish_if_over(s);
    watch_streams(s);
}

/* Gives back what a command holds; kills it when it still runs, with its process group. */
void av_command_end(struct av_session *s)
{
    struct av_command *c = &s->command;

    if (c->pid > 0)
        kill(-c->pid, SIGKILL);
    c->pid = 0;
    av_watch_close(&c->in);
    av_watch_close(&c->out);
    av_watch_close(&c->err);
    av_buffer_free(&c->held);
}

/* --- frames --------------------------------------------------------------------------- */

static bool take_input(struct av_session *s, const unsigned char *payload, size_t size)
{
    struct av_command *c = &s->command;

    if (size > c->in_credit)
        return false;
    c->in_credit -= (uint32_t)size;
    if (c->in_ended || input_of(c)->fd < 0)
        return true; /* on its way when the command closed its stdin */
    if (size == 0)
        c->in_ended = true;
    if (!av_buffer_append(&c->held, payload, size))
        return false;
    feed(s);
    return true;
}

static bool take_window(struct av_command *c, const unsigned char *payload, size_t size)
{
    struct av_window window;

    if (size != sizeof window)
        return false;
    memcpy(&window, payload, sizeof window);
    if (window.stream != AV_STDOUT && window.stream != AV_STDERR)
        return false;
    uint32_t *credit = &c->credit[window.stream == AV_STDERR];
    return !__builtin_add_overflow(*credit, window.bytes, credit);
}

static bool take_signal(struct av_command *c, const unsigned char *payload, size_t size)
{
    uint32_t number, group;

    if (size != 8)
        return false;
    memcpy(&number, payload, 4);
    memcpy(&group, payload + 4, 4);
    if (number < 1 || number > (uint32_t)SIGRTMAX)
        return false;
    if (c->pid > 0) /* it may have ended while the signal was on its way */
        kill(group ? -c->pid : c->pid, (int)number);
    return true;
}

static bool take_size(struct av_command *c, const unsigned char *payload, size_t size)
{
    struct winsize window = {0};

    if (size != 4)
        return false;
    memcpy(&window.ws_row, payload, 2);
    memcpy(&window.ws_col, payload + 2, 2);
    if (c->tty && c->out.fd >= 0)
        ioctl(c->out.fd, TIOCSWINSZ, &window);
    return true;
}

bool av_command_frame(struct av_session *s, uint8_t type, unsigned char *payload, size_t size)
{
    bool good = false;

    switch (type) {
    case AV_STDIN: good = take_input(s, payload, size); break;
    case AV_WINDOW: good = take_window(&s->command, payload, size); break;
    case AV_SIGNAL: good = take_signal(&s->command, payload, size); break;
    case AV_RESIZE: good = take_size(&s->command, payload, size); break;
    }
    watch_streams(s);
    return good;
}

/* --- starting ------------------------------------------------------------------------- */

/* Appends the agent's own variables to those in `env`, as far as they are not among them. */
static void add_own(char **env, size_t own)
{
    size_t given = 0, n;

    while (env[given])
        given++;
    n = given;
    for (size_t i = 0; i < own; i++) {
        size_t name = strcspn(environ[i], "=") + 1;
        bool seen = false;
        for (size_t j = 0; j < given; j++)
            seen = seen || !strncmp(environ[i], env[j], name);
        if (!seen)
            env[n++] = environ[i];
    }
}

/* Pointers to `arguments` and `variables` strings, NULL behind each; NULL when they are not there.
 * The caller frees it. */
static char **parse(const struct av_exec *e, char *text, size_t size, const char **cwd)
{
    size_t variables = e->variables == AV_NONE ? 0 : e->variables, n = 0, own = 0, total;
    char **strings, *end = text + size;

    if (size == 0 || end[-1] || e->arguments == 0 || e->arguments > size || variables > size)
        return NULL;
    total = 1 + e->arguments + variables;
    while (e->flags & AV_ENV_ADDED && environ[own])
        own++;
    strings = calloc(total + own + 2, sizeof *strings);
    for (size_t i = 0; strings && i < total && text < end; i++) {
        if (i == 0)
            *cwd = text;
        else
            strings[i - 1 + (i > e->arguments)] = text;
        text += strlen(text) + 1;
        n++;
    }
    if (n == total && text == end) {
        add_own(strings + e->arguments + 1, own);
        return strings;
    }
    free(strings);
    return NULL;
}

static int open_terminal(struct av_spawn *spawn, struct av_command *c, const struct av_exec *e)
{
    struct winsize window = {.ws_row = e->rows, .ws_col = e->columns};
    int root = av_root_open(), unlock = 0, fd, peer;

    fd = root < -1 ? root : av_root_open_file(root, "/dev/ptmx", O_RDWR | O_NOCTTY | O_NONBLOCK);
    if (root >= 0)
        close(root);
    if (fd < 0)
        return fd;
    c->out.fd = fd;
    if (ioctl(fd, TIOCSPTLCK, &unlock) < 0 || ioctl(fd, TIOCSWINSZ, &window) < 0)
        return -errno;
    peer = ioctl(fd, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (peer < 0 || (e->uid != AV_NONE && fchown(peer, e->uid, (gid_t)-1) < 0))
        return -errno;
    spawn->in = spawn->out = spawn->err = peer;
    return 0;
}

/* theirs: the command's end; the other, ours, goes to `watch`. */
static int open_pipe(bool null, bool input, int *theirs, struct av_watch *watch)
{
    int ends[2];

    *theirs = av_null_fd;
    if (null)
        return 0;
    if (pipe2(ends, O_CLOEXEC) < 0)
        return -errno;
    *theirs = ends[input ? 0 : 1];
    watch->fd = ends[input ? 1 : 0];
    return fcntl(watch->fd, F_SETFL, O_NONBLOCK) < 0 ? -errno : 0;
}

static int open_streams(struct av_spawn *spawn, struct av_command *c, const struct av_exec *e)
{
    int result;

    if (e->flags & AV_TTY)
        return open_terminal(spawn, c, e);
    result = open_pipe(e->flags & AV_IN_NULL, true, &spawn->in, &c->in);
    if (result == 0)
        result = open_pipe(e->flags & AV_OUT_NULL, false, &spawn->out, &c->out);
    if (result == 0 && e->flags & AV_ERR_TO_OUT)
        spawn->err = spawn->out;
    else if (result == 0)
        result = open_pipe(e->flags & AV_ERR_NULL, false, &spawn->err, &c->err);
    return result;
}

static void close_theirs(const struct av_spawn *spawn)
{
    int fds[] = {spawn->in, spawn->out, spawn->err};

    for (int i = 0; i < 3; i++) {
        bool seen = fds[i] < 0 || fds[i] == av_null_fd;
        for (int j = 0; j < i; j++)
            seen = seen || fds[j] == fds[i];
        if (!seen)
            close(fds[i]);
    }
}

static pid_t start(struct av_session *s, const struct av_exec *e, struct av_spawn *spawn)
{
    struct av_command *c = &s->command;
    pid_t pid;

    *c = (struct av_command){
        .tty = e->flags & AV_TTY,
        .in = {.fd = -1, .ready = in_ready, .session = s},
        .out = {.fd = -1, .ready = out_ready, .session = s},
        .err = {.fd = -1, .ready = err_ready, .session = s},
        .credit = {e->window, e->window},
        .in_credit = AV_STDIN_WINDOW,
        .in_ended = e->flags & AV_IN_NULL && !(e->flags & AV_TTY),
    };
    spawn->in = spawn->out = spawn->err = -1;
    spawn->failed = c->tty ? "/dev/ptmx" : "pipe";
    pid = open_streams(spawn, c, e);
    if (pid == 0)
        pid = av_spawn(spawn);
    close_theirs(spawn);
    if (pid < 0)
        av_command_end(s);
    else
        c->pid = pid;
    return pid;
}

void av_command_start(struct av_session *s, unsigned char *payload, size_t size)
{
    struct av_exec e;
    struct av_spawn spawn = {0};
    char **strings = NULL;
    uint32_t number;
    pid_t pid;

    if (size > sizeof e) {
        memcpy(&e, payload, sizeof e);
        strings = parse(&e, (char *)payload + sizeof e, size - sizeof e, &spawn.cwd);
    }
    if (!strings) {
        av_session_end(s);
        return;
    }
    spawn.argv = strings;
    spawn.env = e.variables == AV_NONE ? environ : strings + e.arguments + 1;
    spawn.uid = e.uid;
    spawn.gid = e.gid;
    spawn.tty = e.flags & AV_TTY;
    pid = start(s, &e, &spawn);
    if (pid < 0) {
        av_send_error(s, -pid, spawn.failed);
    } else {
        number = (uint32_t)pid;
        s->state = AV_RUNNING;
        av_send(s, AV_STARTED, &number, sizeof number);
        watch_streams(s);
    }
    free(strings);
}
