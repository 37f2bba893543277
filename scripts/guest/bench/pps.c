/*
 * Counts small UDP packets between two machines, in one direction at a time.
 *
 * usage: pps serve PORT                                      the other end; serves until killed
 *        pps send HOST PORT MILLISECONDS SIZE                we send, HOST counts
 *        pps receive HOST PORT MILLISECONDS SIZE             HOST sends, we count
 *
 * SIZE is the payload in bytes. Client and server agree over TCP, the packets go over UDP to and
 * from the same port number. The client prints one line of JSON: packets sent and received, and
 * the nanoseconds between the first and the last packet that the receiver saw.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { BATCH = 64, SIZE_MAX_BYTES = 1472, BUFFER_BYTES = 8 << 20 };

struct request {
    uint32_t client_sends, milliseconds, size, udp_port;
};

struct count {
    uint64_t packets, first_ns, last_ns;
};

static void fatal(const char *what)
{
    fprintf(stderr, "pps: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static struct sockaddr_in address(const char *host, unsigned port)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};

    if (inet_pton(AF_INET, host, &a.sin_addr) != 1) {
        errno = EINVAL;
        fatal(host);
    }
    return a;
}

static int udp_socket(unsigned port, uint32_t *bound)
{
    struct sockaddr_in a = address("0.0.0.0", port);
    socklen_t length = sizeof a;
    int bytes = BUFFER_BYTES, s = socket(AF_INET, SOCK_DGRAM, 0);

    if (s < 0 || bind(s, (struct sockaddr *)&a, sizeof a) < 0)
        fatal("UDP socket");
    /* A receiver that is scheduled late should lose packets in the device, not here. */
    if (setsockopt(s, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof bytes) < 0)
        fatal("SO_RCVBUFFORCE");
    if (getsockname(s, (struct sockaddr *)&a, &length) < 0)
        fatal("getsockname");
    *bound = ntohs(a.sin_port);
    return s;
}

/* --- the two directions --------------------------------------------------------------- */

struct batch {
    struct mmsghdr messages[BATCH];
    struct iovec parts[BATCH];
    char data[BATCH][SIZE_MAX_BYTES];
};

static struct batch batch;

static void prepare(uint32_t size)
{
    for (int i = 0; i < BATCH; i++) {
        batch.parts[i] = (struct iovec){batch.data[i], size};
        batch.messages[i].msg_hdr = (struct msghdr){.msg_iov = &batch.parts[i], .msg_iovlen = 1};
    }
}

static uint64_t send_for(int udp, const struct request *r)
{
    uint64_t sent = 0, end = now_ns() + r->milliseconds * 1000000ull;

    prepare(r->size);
    while (now_ns() < end) {
        int n = sendmmsg(udp, batch.messages, BATCH, 0);
        if (n > 0)
            sent += (uint64_t)n;
        else if (errno != ENOBUFS && errno != EAGAIN && errno != ECONNREFUSED && errno != EINTR)
            fatal("sendmmsg");
    }
    return sent;
}

/* Counts until the other side says on `control` that it is done, and the socket is empty. */
static struct count receive_until_done(int udp, int control)
{
    struct pollfd fds[2] = {{.fd = udp, .events = POLLIN}, {.fd = control, .events = POLLIN}};
    struct count c = {0};

    prepare(SIZE_MAX_BYTES);
    for (;;) {
        int n = recvmmsg(udp, batch.messages, BATCH, MSG_DONTWAIT, NULL);
        if (n > 0) {
            c.last_ns = now_ns();
            if (c.packets == 0)
                c.first_ns = c.last_ns;
            c.packets += (uint64_t)n;
            continue;
        }
        if (n < 0 && errno != EAGAIN && errno != EINTR && errno != ECONNREFUSED)
            fatal("recvmmsg");
        if (fds[1].revents)
            return c;
        if (poll(fds, 2, -1) < 0 && errno != EINTR)
            fatal("poll");
    }
}

static void put(int control, const void *from, size_t size)
{
    if (send(control, from, size, MSG_NOSIGNAL) != (ssize_t)size)
        fatal("control connection");
}

static void get(int control, void *to, size_t size)
{
    ssize_t n = recv(control, to, size, MSG_WAITALL);

    if (n != (ssize_t)size) {
        if (n >= 0)
            errno = ECONNRESET;
        fatal("control connection");
    }
}

/* --- the two ends ---------------------------------------------------------------------- */

static void serve_one(int control, unsigned port, struct sockaddr_in client)
{
    uint32_t bound;
    struct request r;
    int udp;

    get(control, &r, sizeof r);
    if (r.size > SIZE_MAX_BYTES || r.milliseconds > 600000) {
        errno = EINVAL;
        fatal("request");
    }
    udp = udp_socket(port, &bound);
    client.sin_port = htons((uint16_t)r.udp_port);
    if (connect(udp, (struct sockaddr *)&client, sizeof client) < 0)
        fatal("connect");
    put(control, &bound, sizeof bound); /* ready */
    if (r.client_sends) {
        struct count c = receive_until_done(udp, control);
        uint64_t sent;
        get(control, &sent, sizeof sent); /* left unread, our close would be a reset */
        put(control, &c, sizeof c);
    } else {
        uint64_t sent = send_for(udp, &r);
        put(control, &sent, sizeof sent);
    }
}

static int serve(unsigned port)
{
    struct sockaddr_in a = address("0.0.0.0", port);
    int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);

    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&a, sizeof a) < 0 || listen(listener, 4) < 0)
        fatal("listen");
    for (;;) {
        socklen_t length = sizeof a;
        int control = accept(listener, (struct sockaddr *)&a, &length);
        pid_t child;

        if (control < 0)
            fatal("accept");
        child = fork(); /* a client that fails ends its own server only */
        if (child < 0)
            fatal("fork");
        if (child == 0) {
            close(listener);
            serve_one(control, port, a);
            exit(0);
        }
        close(control);
        while (waitpid(child, NULL, 0) < 0 && errno == EINTR)
            ;
    }
}

static int client(int sends, const char *host, unsigned port, uint32_t milliseconds, uint32_t size)
{
    struct request r = {(uint32_t)sends, milliseconds, size, 0};
    struct sockaddr_in a = address(host, port);
    int control = socket(AF_INET, SOCK_STREAM, 0), udp = udp_socket(0, &r.udp_port);
    struct count c;
    uint64_t sent;
    uint32_t ready;

    if (size > SIZE_MAX_BYTES || connect(control, (struct sockaddr *)&a, sizeof a) < 0)
        fatal(host);
    if (connect(udp, (struct sockaddr *)&a, sizeof a) < 0)
        fatal("connect");
    put(control, &r, sizeof r);
    get(control, &ready, sizeof ready);
    if (sends) {
        sent = send_for(udp, &r);
        put(control, &sent, sizeof sent);
        get(control, &c, sizeof c);
    } else {
        c = receive_until_done(udp, control);
        get(control, &sent, sizeof sent);
    }
    printf("{\"sent\": %llu, \"received\": %llu, \"ns\": %llu}\n", (unsigned long long)sent,
           (unsigned long long)c.packets, (unsigned long long)(c.last_ns - c.first_ns));
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "serve") == 0)
        return serve((unsigned)atoi(argv[2]));
    if (argc == 6 && (strcmp(argv[1], "send") == 0 || strcmp(argv[1], "receive") == 0))
        return client(argv[1][0] == 's', argv[2], (unsigned)atoi(argv[3]),
                      (uint32_t)atoi(argv[4]), (uint32_t)atoi(argv[5]));
    fprintf(stderr, "usage: pps serve PORT | pps send|receive HOST PORT MILLISECONDS SIZE\n");
    return 2;
}
