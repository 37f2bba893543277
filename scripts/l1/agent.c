/*
 * The testbed's agent: PID 1 of L1 after init. It serves one virtio-serial port per slot,
 * /dev/vport0p<slot+1>; scripts/l1/client.py is the other end. One command runs per slot at a
 * time, in its own mount, network and process namespaces, so nothing of it outlives it.
 *
 * A frame is: type (1 byte), payload length (u32 LE), payload.
 *   from the client   S start: NUL-ended nonce, OUT folder, working folder, the number of
 *                     environment entries, those entries, then the command
 *                     I stdin bytes (none: end of file)     K a signal number (1 byte)
 *   to the client     A the nonce: started    O, E stdout, stderr bytes
 *                     C u32: so many stdin bytes consumed   X u32: exit status
 * The client may have WINDOW stdin bytes not yet consumed, so that a signal never queues
 * behind stdin. A client that goes away ends its command.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { WINDOW = 256 * 1024, FRAME_MAX = 1024 * 1024, CHUNK = 64 * 1024, MAX_ARGS = 4096 };
enum { NOT_STARTED = 125 };

struct command {
    char *nonce, *out, *cwd, **env, **argv;
};

struct session {
    int port;          /* non-blocking */
    int input;         /* pipe to the command's stdin, non-blocking; -1 when closed */
    int output[2];     /* pipes from its stdout and stderr; -1 at end of file */
    int done;          /* pidfd of its namespace's first process */
    pid_t pid;
    int input_ended;
    size_t pending;    /* stdin bytes held */
    unsigned char held[WINDOW];
};

static unsigned char frame[FRAME_MAX];

static void fatal(const char *what)
{
    fprintf(stderr, "agent: %s: %s\n", what, strerror(errno));
    exit(NOT_STARTED);
}

/* --- the port ------------------------------------------------------------------------- */

/* Waits until a client is connected. Edge-triggered: without a client the port polls as hung
 * up for ever, and only a change of that state wakes us. */
static void wait_client(int port)
{
    struct epoll_event ev = {.events = EPOLLIN | EPOLLOUT | EPOLLET};
    int ep = epoll_create1(EPOLL_CLOEXEC);

    if (ep < 0 || epoll_ctl(ep, EPOLL_CTL_ADD, port, &ev) < 0)
        fatal("epoll");
    do {
        if (epoll_wait(ep, &ev, 1, -1) < 0 && errno != EINTR)
            fatal("epoll_wait");
    } while (ev.events & EPOLLHUP);
    close(ep);
}

/* 0, or -1 when the client is gone. */
static int port_wait(int port, short events)
{
    struct pollfd p = {.fd = port, .events = events};

    while (poll(&p, 1, -1) < 0)
        if (errno != EINTR)
            return -1;
    return p.revents & POLLHUP && !(p.revents & POLLIN) ? -1 : 0;
}

static int port_read(int port, void *to, size_t size)
{
    unsigned char *at = to;

    while (size > 0) {
        ssize_t n = read(port, at, size);
        if (n > 0) {
            at += n;
            size -= (size_t)n;
        } else if (n == 0 || (errno != EAGAIN && errno != EINTR) || port_wait(port, POLLIN) < 0) {
            return -1;
        }
    }
    return 0;
}

static int port_write(int port, const void *from, size_t size)
{
    const unsigned char *at = from;

    while (size > 0) {
        ssize_t n = write(port, at, size < CHUNK / 2 ? size : CHUNK / 2);
        if (n > 0) {
            at += n;
            size -= (size_t)n;
        } else if ((errno != EAGAIN && errno != EINTR) || port_wait(port, POLLOUT) < 0) {
            return -1;
        }
    }
    return 0;
}

static int send_frame(int port, char type, const void *payload, uint32_t size)
{
    unsigned char head[5] = {(unsigned char)type};

    memcpy(head + 1, &size, 4);
    return port_write(port, head, 5) < 0 ? -1 : port_write(port, payload, size);
}

/* The frame's type with its payload in `frame`, or -1 when the client is gone or confused. */
static int receive_frame(int port, uint32_t *size)
{
    unsigned char head[5];

    if (port_read(port, head, 5) < 0)
        return -1;
    memcpy(size, head + 1, 4);
    if (*size >= FRAME_MAX || port_read(port, frame, *size) < 0)
        return -1;
    frame[*size] = 0;
    return head[0];
}

/* --- starting ------------------------------------------------------------------------- */

static char *next_string(char **at, char *end)
{
    char *s = *at;

    if (s >= end)
        return NULL;
    *at = s + strlen(s) + 1;
    return s;
}

static int parse_start(struct command *c, uint32_t size)
{
    static char *strings[MAX_ARGS + 2];
    char *at = (char *)frame, *end = at + size, *count;
    int n = 0, envs;

    c->nonce = next_string(&at, end);
    c->out = next_string(&at, end);
    c->cwd = next_string(&at, end);
    count = next_string(&at, end);
    if (!count)
        return -1;
    envs = atoi(count);
    c->env = strings;
    while (n < MAX_ARGS && (strings[n] = next_string(&at, end))) {
        n++;
        if (n == envs)
            strings[n++] = NULL; /* ends env; argv begins behind it */
    }
    strings[n] = NULL;
    c->argv = strings + envs + 1;
    return envs > 0 && n > envs + 1 ? 0 : -1;
}

static volatile pid_t command_pid;

static void forward_signal(int sig)
{
    if (command_pid > 0)
        kill(-command_pid, sig);
}

/* First process of the new namespaces: lays out the tree, runs the command, reaps orphans.
 * The command itself is not PID 1, whose signals the kernel treats differently. */
static void run_namespace(int slot, const struct command *c)
{
    const int forwarded[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2};
    char number[12];
    pid_t pid;
    int status;

    snprintf(number, sizeof number, "%d", slot);
    pid = fork();
    if (pid == 0) {
        dup2(2, 1);
        execl("/session", "session", number, c->out, (char *)NULL);
        fatal("/session");
    }
    if (pid < 0 || waitpid(pid, &status, 0) < 0 || status != 0) {
        fprintf(stderr, "agent: the command's file tree could not be laid out\n");
        exit(NOT_STARTED);
    }
    if (chroot("/tree") < 0 || chdir(c->cwd) < 0)
        fatal(c->cwd);
    for (size_t i = 0; i < sizeof forwarded / sizeof *forwarded; i++)
        signal(forwarded[i], forward_signal);
    pid = fork();
    if (pid == 0) {
        for (size_t i = 0; i < sizeof forwarded / sizeof *forwarded; i++)
            signal(forwarded[i], SIG_DFL);
        signal(SIGPIPE, SIG_DFL);
        setsid();
        execvpe(c->argv[0], c->argv, c->env);
        fprintf(stderr, "testbed: %s: %s\n", c->argv[0], strerror(errno));
        _exit(errno == ENOENT ? 127 : 126);
    }
    command_pid = pid;
    close(0);
    close(1);
    close(2);
    for (;;) {
        pid_t ended = waitpid(-1, &status, 0);
        if (ended == pid || (ended < 0 && errno != EINTR))
            break;
    }
    _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
}

static void start(struct session *s, int slot, const struct command *c)
{
    int in[2], out[2], err[2];

    if (pipe2(in, O_CLOEXEC) < 0 || pipe2(out, O_CLOEXEC) < 0 || pipe2(err, O_CLOEXEC) < 0)
        fatal("pipe");
    s->pid = (pid_t)syscall(SYS_clone, CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC |
                            CLONE_NEWUTS | SIGCHLD, NULL, NULL, NULL, 0L);
    if (s->pid < 0)
        fatal("clone");
    if (s->pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        dup2(in[0], 0);
        dup2(out[1], 1);
        dup2(err[1], 2);
        close_range(3, ~0U, 0); /* it does not exec; a pipe end kept here hides end of file */
        run_namespace(slot, c);
    }
    close(in[0]);
    close(out[1]);
    close(err[1]);
    fcntl(in[1], F_SETFL, O_NONBLOCK);
    s->input = in[1];
    s->output[0] = out[0];
    s->output[1] = err[0];
    s->done = (int)syscall(SYS_pidfd_open, s->pid, 0);
    s->input_ended = 0;
    s->pending = 0;
}

/* --- running -------------------------------------------------------------------------- */

static void close_input(struct session *s)
{
    if (s->input >= 0)
        close(s->input);
    s->input = -1;
}

/* Hands held bytes to the command; a command that closed its stdin gets none, quietly. */
static int feed(struct session *s)
{
    ssize_t n = s->pending && s->input >= 0 ? write(s->input, s->held, s->pending) : 0;
    uint32_t consumed;

    if (n < 0 && errno != EAGAIN)
        close_input(s);
    consumed = s->input < 0 ? (uint32_t)s->pending : n > 0 ? (uint32_t)n : 0;
    s->pending -= consumed;
    memmove(s->held, s->held + consumed, s->pending);
    if (s->pending == 0 && s->input_ended)
        close_input(s);
    return consumed ? send_frame(s->port, 'C', &consumed, 4) : 0;
}

static int from_client(struct session *s)
{
    uint32_t size;
    int type = receive_frame(s->port, &size);

    if (type == 'K' && size == 1) {
        kill(s->pid, frame[0]);
    } else if (type == 'I' && size == 0) {
        s->input_ended = 1;
    } else if (type == 'I' && size <= WINDOW - s->pending) {
        memcpy(s->held + s->pending, frame, size);
        s->pending += size;
    } else {
        return -1;
    }
    return feed(s);
}

static int from_command(struct session *s, int which)
{
    static unsigned char bytes[CHUNK];
    ssize_t n = read(s->output[which], bytes, sizeof bytes);

    if (n > 0)
        return send_frame(s->port, which ? 'E' : 'O', bytes, (uint32_t)n);
    if (n == 0 || errno != EINTR) {
        close(s->output[which]);
        s->output[which] = -1;
    }
    return 0;
}

/* Carries bytes until the command has ended and its output is drained; -1: client gone. */
static int carry(struct session *s)
{
    int running = 1;

    while (running || s->output[0] >= 0 || s->output[1] >= 0) {
        struct pollfd p[5] = {
            {.fd = s->port, .events = POLLIN},
            {.fd = s->output[0], .events = POLLIN},
            {.fd = s->output[1], .events = POLLIN},
            {.fd = s->pending ? s->input : -1, .events = POLLOUT},
            {.fd = running ? s->done : -1, .events = POLLIN},
        };
        if (poll(p, 5, -1) < 0)
            continue;
        if (p[0].revents && from_client(s) < 0)
            return -1;
        if ((p[1].revents && from_command(s, 0) < 0) || (p[2].revents && from_command(s, 1) < 0))
            return -1;
        if (p[3].revents && feed(s) < 0)
            return -1;
        if (p[4].revents)
            running = 0;
    }
    return 0;
}

static void serve(int slot, int port)
{
    static struct session s;
    struct command c;
    uint32_t size, status;
    int raw;

    wait_client(port);
    if (receive_frame(port, &size) != 'S' || parse_start(&c, size) < 0)
        return;
    s.port = port;
    if (send_frame(port, 'A', c.nonce, (uint32_t)strlen(c.nonce)) < 0)
        return;
    start(&s, slot, &c);
    if (carry(&s) < 0)
        kill(s.pid, SIGKILL);
    for (int i = 0; i < 2; i++)
        if (s.output[i] >= 0)
            close(s.output[i]);
    close_input(&s);
    close(s.done);
    while (waitpid(s.pid, &raw, 0) < 0 && errno == EINTR)
        ;
    status = (uint32_t)(WIFEXITED(raw) ? WEXITSTATUS(raw) : 128 + WTERMSIG(raw));
    if (send_frame(port, 'X', &status, 4) == 0)
        while (receive_frame(port, &size) >= 0) /* late stdin; ends when the client leaves */
            ;
}

/* --- slots ---------------------------------------------------------------------------- */

static int open_port(int slot)
{
    char path[32], events[4096];
    int watch = inotify_init1(IN_CLOEXEC), port;

    snprintf(path, sizeof path, "/dev/vport0p%d", slot + 1);
    if (watch < 0 || inotify_add_watch(watch, "/dev", IN_CREATE) < 0)
        fatal("inotify");
    while ((port = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC)) < 0 && errno == ENOENT)
        if (read(watch, events, sizeof events) < 0 && errno != EINTR)
            fatal("inotify");
    close(watch);
    if (port < 0)
        fatal(path);
    return port;
}

static int slot_count(void)
{
    char line[4096] = "";
    FILE *f = fopen("/proc/cmdline", "r");
    char *found = f && fgets(line, sizeof line, f) ? strstr(line, "avmm.slots=") : NULL;

    return found ? atoi(found + strlen("avmm.slots=")) : 1;
}

/*
 * Keeps one VM with one vCPU for as long as L1 lives. The first VM of a kernel and the end of its
 * last switch KVM's hooks in the scheduler and the APIC code on and off by patching kernel text,
 * and QEMU 7.2 with several CPU threads may go on with a translation it read while the text was
 * being patched (8.1 locks the pages first): then L1 spins on a breakpoint that is long gone, or
 * runs without the hook, and vCPUs wake with another's registers. With a VM always there, no
 * command's first or last VM patches anything.
 */
static void hold_vm(void)
{
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    int vm = kvm < 0 ? -1 : ioctl(kvm, KVM_CREATE_VM, 0);

    if (vm < 0 || ioctl(vm, KVM_CREATE_IRQCHIP, 0) < 0 || ioctl(vm, KVM_CREATE_VCPU, 0) < 0)
        fatal("/dev/kvm");
}

int main(void)
{
    int slots = slot_count();

    hold_vm();

    for (int slot = 0; slot < slots; slot++) {
        if (fork() == 0) {
            signal(SIGPIPE, SIG_IGN);
            /* A fresh open for each client: closing drops what the last one left unread. */
            for (;;) {
                int port = open_port(slot);
                serve(slot, port);
                close(port);
            }
        }
    }
    for (;;)
        if (wait(NULL) < 0 && errno == ECHILD)
            pause();
}
