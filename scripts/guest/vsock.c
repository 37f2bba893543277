/* Sockets of AF_VSOCK for the scripts of test guests, whose shell knows none.
 *
 *   vsock serve PORT WHAT      say LISTENING, and do WHAT with each connection that comes, at once:
 *                              echo  send back what comes, and the end of it
 *                              drop  take what comes
 *                              zero  send zeros for as long as they are taken
 *                              deaf  do not even accept
 *   vsock cat PORT             connect to the host, copy stdin to it, its end too, and what comes
 *                              to stdout
 *   vsock zero PORT BYTES      connect to the host and send zeros; then wait for its end
 *   vsock check PORT N BYTES   N connections to the host at once, each of which sends BYTES of its
 *                              own, and gets the same back
 *   vsock rate PORT N          N connections to the host, one after the other
 *   vsock measure PORT HOW MS  for so long: send or receive bytes on one connection, echo a byte
 *                              there and back, or connect and close; says how many in which time
 *
 * An exit status of 0 means that all went well. PORTs of the host are those of CID 2, or of the CID
 * in the environment, as VSOCK_CID. With VSOCK_UNIX=PATH in it, serve is on the host, for guests
 * whose port PORT is the unix socket PATH_PORT. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

#define CHUNK_BYTES 65536u
#define BACKLOG 256

static uint8_t chunk[CHUNK_BYTES];

static void fail(const char *what)
{
    fprintf(stderr, "vsock: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t number(const char *text)
{
    char *end;
    uint64_t value = strtoull(text, &end, 10);

    if (*text == '\0' || *end != '\0') {
        fprintf(stderr, "vsock: '%s' is no number\n", text);
        exit(2);
    }
    return value;
}

static int open_socket(void)
{
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (fd < 0)
        fail("socket");
    return fd;
}

static struct sockaddr_vm address(uint32_t cid, uint64_t port)
{
    return (struct sockaddr_vm){ .svm_family = AF_VSOCK, .svm_cid = cid,
                                 .svm_port = (uint32_t)port };
}

static int connect_to(uint64_t port)
{
    const char *cid = getenv("VSOCK_CID");
    struct sockaddr_vm to = address(cid != NULL ? (uint32_t)number(cid) : VMADDR_CID_HOST, port);
    int fd = open_socket();

    if (connect(fd, (struct sockaddr *)&to, sizeof(to)) < 0)
        fail("connect");
    return fd;
}

/* Whether all of it went. */
static bool write_all(int fd, const uint8_t *data, size_t bytes)
{
    while (bytes != 0) {
        ssize_t put = write(fd, data, bytes);

        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0)
            return false;
        data += put;
        bytes -= (size_t)put;
    }
    return true;
}

static int copy(int from, int to)
{
    ssize_t got;

    while ((got = read(from, chunk, sizeof(chunk))) > 0)
        if (to >= 0 && !write_all(to, chunk, (size_t)got))
            return 1;
    return got < 0;
}

static int zero(int fd, uint64_t bytes)
{
    while (bytes != 0) {
        size_t piece = bytes < sizeof(chunk) ? (size_t)bytes : sizeof(chunk);

        if (!write_all(fd, chunk, piece))
            return 1;
        bytes -= piece;
    }
    return 0;
}

static int serve_one(int fd, const char *what)
{
    if (strcmp(what, "echo") == 0)
        return copy(fd, fd);
    if (strcmp(what, "drop") == 0)
        return copy(fd, -1);
    return zero(fd, UINT64_MAX);
}

static int bind_unix(const char *path, uint64_t port)
{
    struct sockaddr_un at = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int bytes = snprintf(at.sun_path, sizeof(at.sun_path), "%s_%llu", path,
                         (unsigned long long)port);

    if (bytes < (int)sizeof(at.sun_path))
        unlink(at.sun_path); /* of one that was killed */
    if (fd < 0 || bytes >= (int)sizeof(at.sun_path) ||
        bind(fd, (struct sockaddr *)&at, sizeof(at)) < 0)
        fail(path);
    return fd;
}

static int bind_vsock(uint64_t port)
{
    struct sockaddr_vm at = address(VMADDR_CID_ANY, port);
    int fd = open_socket();

    if (bind(fd, (struct sockaddr *)&at, sizeof(at)) < 0)
        fail("bind");
    return fd;
}

static int serve(uint64_t port, const char *what)
{
    const char *path = getenv("VSOCK_UNIX");
    int fd = path != NULL ? bind_unix(path, port) : bind_vsock(port), client;

    signal(SIGCHLD, SIG_IGN);
    if (listen(fd, BACKLOG) < 0)
        fail("listen");
    puts("LISTENING");
    fflush(stdout);
    if (strcmp(what, "deaf") == 0)
        for (;;)
            pause();
    while ((client = accept4(fd, NULL, NULL, SOCK_CLOEXEC)) >= 0) {
        if (fork() == 0) {
            close(fd);
            _exit(serve_one(client, what));
        }
        close(client);
    }
    fail("accept");
    return 1;
}

static int cat(int fd)
{
    pid_t child = fork();

    if (child == 0) {
        int result = copy(STDIN_FILENO, fd);
        _exit(shutdown(fd, SHUT_WR) < 0 ? 1 : result);
    }
    int result = copy(fd, STDOUT_FILENO), status = 0;
    kill(child, SIGTERM);
    waitpid(child, &status, 0);
    return result | (WIFEXITED(status) ? WEXITSTATUS(status) : 0);
}

/* A stream of bytes that a seed makes. */
static uint8_t next_byte(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return (uint8_t)(*state >> 32);
}

static int check_one(uint64_t port, uint64_t seed, uint64_t bytes)
{
    uint64_t out = seed, in = seed, to_send = bytes, to_come = bytes;
    size_t held = 0, gone = 0;
    int fd = connect_to(port);

    fcntl(fd, F_SETFL, O_NONBLOCK);
    for (;;) {
        bool sends = held != gone || to_send != 0;
        struct pollfd at = { .fd = fd, .events = sends ? POLLIN | POLLOUT : POLLIN };

        if (poll(&at, 1, -1) < 0)
            fail("poll");
        if (at.revents & (POLLIN | POLLERR | POLLHUP)) {
            uint8_t came[8192];
            ssize_t got = read(fd, came, sizeof(came));

            if (got == 0)
                return to_come != 0 || sends;
            if (got < 0 && errno != EAGAIN)
                fail("read");
            for (ssize_t i = 0; i < got; i++)
                if (to_come-- == 0 || came[i] != next_byte(&in))
                    return 1;
        }
        if (!sends || !(at.revents & POLLOUT))
            continue;
        if (held == gone) {
            for (held = gone = 0; held < sizeof(chunk) && to_send != 0; held++, to_send--)
                chunk[held] = next_byte(&out);
        }
        ssize_t put = write(fd, chunk + gone, held - gone);
        if (put < 0 && errno != EAGAIN)
            fail("write");
        gone += put > 0 ? (size_t)put : 0;
        if (held == gone && to_send == 0 && shutdown(fd, SHUT_WR) < 0)
            fail("shutdown");
    }
}

static int check(uint64_t port, uint64_t count, uint64_t bytes)
{
    int failures = 0, status;

    for (uint64_t i = 0; i < count; i++)
        if (fork() == 0)
            _exit(check_one(port, 0x9e3779b97f4a7c15u * (i + 1), bytes));
    while (wait(&status) > 0)
        failures += status != 0;
    printf("%d of %llu failed\n", failures, (unsigned long long)count);
    return failures != 0;
}

static int rate(uint64_t port, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++)
        close(connect_to(port));
    return 0;
}

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Bytes go there until the peer has had them all, or come. */
static int64_t measure_bytes(uint64_t port, bool send, uint64_t end)
{
    int fd = connect_to(port);
    int64_t total = 0;

    while (now_ns() < end) {
        ssize_t n = send ? write(fd, chunk, sizeof(chunk)) : read(fd, chunk, sizeof(chunk));

        if (n <= 0)
            fail(send ? "write" : "read");
        total += n;
    }
    if (send && (shutdown(fd, SHUT_WR) < 0 || copy(fd, -1) != 0))
        fail("shutdown");
    close(fd);
    return total;
}

static int64_t measure_echoes(uint64_t port, uint64_t end)
{
    int fd = connect_to(port);
    int64_t count = 0;

    for (; now_ns() < end; count++)
        if (write(fd, chunk, 1) != 1 || read(fd, chunk, 1) != 1)
            fail("echo");
    close(fd);
    return count;
}

static int64_t measure_connections(uint64_t port, uint64_t end)
{
    int64_t count = 0;

    for (; now_ns() < end; count++)
        close(connect_to(port));
    return count;
}

static int measure(uint64_t port, const char *how, uint64_t ms)
{
    uint64_t start = now_ns(), end = start + ms * 1000000u;
    int64_t count;

    if (strcmp(how, "echo") == 0)
        count = measure_echoes(port, end);
    else if (strcmp(how, "connect") == 0)
        count = measure_connections(port, end);
    else
        count = measure_bytes(port, strcmp(how, "send") == 0, end);
    printf("{\"count\": %lld, \"ns\": %llu}\n", (long long)count,
           (unsigned long long)(now_ns() - start));
    return 0;
}

int main(int argc, char **argv)
{
    const char *command = argc > 2 ? argv[1] : "";
    uint64_t port = argc > 2 ? number(argv[2]) : 0;

    signal(SIGPIPE, SIG_IGN);
    if (strcmp(command, "serve") == 0 && argc == 4)
        return serve(port, argv[3]);
    if (strcmp(command, "cat") == 0 && argc == 3)
        return cat(connect_to(port));
    if (strcmp(command, "zero") == 0 && argc == 4) {
        int fd = connect_to(port);

        if (zero(fd, number(argv[3])) != 0 || shutdown(fd, SHUT_WR) < 0)
            fail("write");
        return copy(fd, -1);
    }
    if (strcmp(command, "check") == 0 && argc == 5)
        return check(port, number(argv[3]), number(argv[4]));
    if (strcmp(command, "rate") == 0 && argc == 4)
        return rate(port, number(argv[3]));
    if (strcmp(command, "measure") == 0 && argc == 5)
        return measure(port, argv[3], number(argv[4]));
    fprintf(stderr, "usage: vsock serve PORT echo|drop|zero|deaf | cat PORT | zero PORT BYTES |\n"
                    "       check PORT N BYTES | rate PORT N |\n"
                    "       measure PORT send|receive|echo|connect MS\n");
    return 2;
}
