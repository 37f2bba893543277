/* A connection of the guest's agent: what a client may send, in pieces of any size, and a command
 * that reads, writes and ends as it likes. No process is made. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "agent/agent.h"
#include "fuzz.h"
#include "host.h"

#define COMMAND_PID 1000000 /* of no process */
#define WORKER_PID 1000001

/* The command's ends of its streams; -1 each while there is none. */
static int command[3] = { -1, -1, -1 };
static bool command_runs;
static struct av_session *session;

/* --- what stands in for the rest of the agent ------------------------------------------ */

int av_null_fd = -1;

void av_null_open(void)
{
}

int av_watch_set(struct av_watch *watch, uint32_t events)
{
    if (watch->fd >= 0)
        watch->events = events;
    return 0;
}

void av_watch_close(struct av_watch *watch)
{
    if (watch->fd >= 0)
        close(watch->fd);
    watch->fd = -1;
    watch->events = 0;
}

struct av_session *av_session_of(pid_t pid)
{
    return session->command.pid == pid || session->worker == pid ? session : NULL;
}

void av_loop_unsent(void)
{
}

int av_root_open(void)
{
    return -1;
}

int av_root_open_file(int root, const char *path, int flags)
{
    CHECK(root == -1);
    return open(path, flags);
}

pid_t av_spawn(struct av_spawn *spawn)
{
    const int ends[3] = { spawn->in, spawn->out, spawn->err };

    /* All that a command would look at is there. */
    CHECK(spawn->argv[0] != NULL && spawn->cwd != NULL);
    for (char **at = spawn->argv; *at != NULL; at++)
        CHECK(strlen(*at) <= AV_FRAME_MAX);
    for (char **at = spawn->env; *at != NULL; at++)
        CHECK(strlen(*at) <= AV_FRAME_MAX);
    spawn->failed = spawn->argv[0];
    if (strcmp(spawn->argv[0], "-") == 0)
        return -ENOENT;
    CHECK(!command_runs);
    for (uint32_t i = 0; i < 3; i++) {
        command[i] = ends[i] < 0 ? -1 : fcntl(ends[i], F_DUPFD_CLOEXEC, 3);
        if (command[i] >= 0)
            fcntl(command[i], F_SETFL, O_NONBLOCK);
    }
    command_runs = true;
    return COMMAND_PID;
}

void av_worker_start(struct av_session *of, uint8_t type, unsigned char *payload, size_t size)
{
    (void)type;
    (void)payload;
    CHECK(size <= AV_FRAME_MAX);
    of->worker = WORKER_PID;
    of->state = AV_WORKING;
}

/* Nobody else may ever be signalled. */
int fuzz_kill(pid_t pid, int number)
{
    CHECK(number > 0);
    CHECK(pid == COMMAND_PID || pid == -COMMAND_PID || pid == WORKER_PID);
    CHECK(pid == WORKER_PID || session->command.pid == COMMAND_PID);
    return 0;
}

/* --- a client and a command ------------------------------------------------------------ */

static void check(void)
{
    const struct av_command *c = &session->command;

    CHECK(session->in.at <= session->in.end && session->in.end <= session->in.capacity);
    CHECK(session->out.at <= session->out.end && session->out.end <= session->out.capacity);
    CHECK(c->held.at <= c->held.end && c->held.end <= c->held.capacity);
    CHECK(c->held.end - c->held.at <= AV_STDIN_WINDOW && c->in_credit <= AV_STDIN_WINDOW);
    /* One frame of each kind at most beyond what stops it. */
    CHECK(session->out.end - session->out.at <= 4 * AV_UNSENT_MAX);
    if (session->state == AV_DEAD)
        CHECK(session->connection.fd == -1 && c->pid == 0 && session->out.bytes == NULL);
}

static void fire(struct av_watch *watch, uint32_t events)
{
    uint32_t due = watch->events & events;

    if (watch->fd >= 0 && due != 0 && session->state != AV_DEAD)
        watch->ready(watch, due);
    check();
}

/* Frames whose heads fit what follows, for the most part. */
static void send_frame(int client, struct fuzz_input *in)
{
    static const uint8_t types[] = { AV_HELLO,  AV_PING,   AV_SET_CLOCK, AV_EXEC,
                                     AV_STDIN,  AV_WINDOW, AV_SIGNAL,    AV_RESIZE,
                                     AV_READ,   AV_EXEC,   AV_STDIN,     AV_SHUTDOWN };
    uint8_t bytes[512] = { 0 }, how = fuzz_u8(in);
    struct av_head head = { .size = fuzz_u8(in), .type = types[how % 12] };

    if ((how & 0xf0) == 0xf0) {
        fuzz_bytes(in, &head, sizeof(head));
    } else if (head.type == AV_HELLO) {
        struct av_hello hello = { .magic = AV_MAGIC, .version = AV_VERSION };

        head.size = sizeof(hello);
        memcpy(bytes + sizeof(head), &hello, sizeof(hello));
    } else {
        if (head.type == AV_SIGNAL || head.type == AV_WINDOW)
            head.size = 8;
        else if (head.type == AV_SET_CLOCK)
            head.size = sizeof(struct av_clock);
        else if (head.type == AV_RESIZE)
            head.size = 4;
        fuzz_bytes(in, bytes + sizeof(head), head.size);
    }
    memcpy(bytes, &head, sizeof(head));
    (void)!send(client, bytes, sizeof(head) + (head.size < 256 ? head.size : 0), MSG_NOSIGNAL);
}

/* An EXEC with strings as they have to be. */
static void send_exec(int client, struct fuzz_input *in)
{
    uint8_t bytes[sizeof(struct av_head) + sizeof(struct av_exec) + 16] = { 0 };
    struct av_head head = { .size = sizeof(struct av_exec) + 7, .type = AV_EXEC };
    struct av_exec exec = {
        .flags = fuzz_u8(in),
        .uid = AV_NONE,
        .gid = AV_NONE,
        .window = fuzz_u16(in),
        .arguments = 2,
        .variables = 1,
    };

    if (exec.flags & AV_TTY && (exec.flags & 0xc0) != 0xc0)
        exec.flags &= ~(uint32_t)AV_TTY; /* a terminal takes its time */
    memcpy(bytes, &head, sizeof(head));
    memcpy(bytes + sizeof(head), &exec, sizeof(exec));
    memcpy(bytes + sizeof(head) + sizeof(exec), "\0a\0b\0c=\0", 8);
    (void)!send(client, bytes, sizeof(head) + sizeof(exec) + 8, MSG_NOSIGNAL);
}

static void send_bytes(int client, struct fuzz_input *in)
{
    uint8_t bytes[256];
    uint32_t count = fuzz_u8(in);

    fuzz_bytes(in, bytes, count);
    (void)!send(client, bytes, count, MSG_NOSIGNAL);
}

static void listen_to(int client)
{
    static uint8_t bytes[65536];

    (void)!recv(client, bytes, sizeof(bytes), 0);
}

static void end_command(struct fuzz_input *in)
{
    for (uint32_t i = 0; i < 3; i++) {
        if (command[i] >= 0)
            close(command[i]);
        command[i] = -1;
    }
    if (!command_runs)
        return;
    command_runs = false;
    if (session->state != AV_DEAD && av_session_of(COMMAND_PID) != NULL)
        av_session_child(session, COMMAND_PID, fuzz_u16(in) & 0x7f7f);
}

static void act_as_command(struct fuzz_input *in)
{
    static uint8_t bytes[8192];
    uint8_t how = fuzz_u8(in);
    int stream = how % 3;

    if (command[stream] < 0)
        return;
    if (how & 0x80) {
        close(command[stream]);
        command[stream] = -1;
    } else if (stream == 0) {
        (void)!read(command[0], bytes, sizeof(bytes));
    } else {
        (void)!write(command[stream], bytes, how & 0x40 ? sizeof(bytes) : how);
    }
}

static void step(int client, struct fuzz_input *in)
{
    struct av_command *c = &session->command;

    switch (fuzz_below(in, 14)) {
    case 0:
    case 1:
        send_frame(client, in);
        break;
    case 2:
        send_exec(client, in);
        break;
    case 3:
        send_bytes(client, in);
        break;
    case 4:
        listen_to(client);
        break;
    case 5:
    case 6:
        fire(&session->connection, EPOLLIN);
        break;
    case 7:
        fire(&session->connection, EPOLLOUT);
        av_session_flush(session); /* as the loop does when no event waits */
        break;
    case 8:
        act_as_command(in);
        break;
    case 9:
        fire(&c->out, EPOLLIN);
        break;
    case 10:
        fire(&c->err, EPOLLIN);
        break;
    case 11:
        fire(fuzz_u8(in) & 1 ? &c->in : &c->out, EPOLLOUT);
        break;
    case 12:
        end_command(in);
        break;
    default:
        if (session->worker != 0)
            av_session_child(session, WORKER_PID, fuzz_u8(in) & 1);
    }
    check();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input in = { data, size }, nothing = { 0 };
    int ends[2];

    signal(SIGPIPE, SIG_IGN); /* as the agent does */
    if (av_null_fd < 0)
        av_null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    CHECK(av_null_fd >= 0);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) == 0);
    session = av_session_create(ends[0]);
    CHECK(session != NULL);
    session->surplus = fuzz_u8(&in) == 0xff;
    while (fuzz_more(&in) && session->state != AV_DEAD)
        step(ends[1], &in);
    av_session_end(session);
    check();
    end_command(&nothing);
    free(session);
    close(ends[1]);
    return 0;
}
