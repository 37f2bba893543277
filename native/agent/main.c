/*
 * avmm-agent: runs commands, moves files and ends the guest for the host, over vsock.
 *
 * usage: avmm-agent [--port N | --unix PATH] [--init-root] [--announce]
 *   --port N      vsock port (1024)
 *   --unix PATH   a Unix socket instead, for tests
 *   --announce    say so on stdout when it listens
 *   --init-root   act in the root of PID 1, when that is not this process's own
 * As avmm-agent-init it is the first program of an initramfs: see init.c.
 */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <linux/netlink.h>
#include <linux/vm_sockets.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { BACKLOG = 128, UEVENT_LIMIT_MS = 1000 };

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

static void die(const char *what)
{
    fprintf(stderr, "avmm-agent: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int listen_unix(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    if (strlen(path) >= sizeof address.sun_path) {
        errno = ENAMETOOLONG;
        die(path);
    }
    strcpy(address.sun_path, path);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) < 0 ||
        listen(fd, BACKLOG) < 0)
        die(path);
    return fd;
}

/* The module may be loaded at any time after us, and each one loaded is announced: there is no
 * time to be guessed. The limit is for kernels that announce nothing. */
static int vsock_socket(void)
{
    struct sockaddr_nl address = {.nl_family = AF_NETLINK, .nl_groups = 1};
    struct pollfd news = {.events = POLLIN};
    char text[4096];
    int fd;

    news.fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_KOBJECT_UEVENT);
    if (news.fd >= 0)
        bind(news.fd, (struct sockaddr *)&address, sizeof address);
    while ((fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)) < 0) {
        if (errno != EAFNOSUPPORT)
            die("vsock");
        poll(&news, 1, UEVENT_LIMIT_MS);
        while (recv(news.fd, text, sizeof text, 0) > 0)
            ;
    }
    if (news.fd >= 0)
        close(news.fd);
    return fd;
}

static int listen_vsock(unsigned port)
{
    struct sockaddr_vm address = {
        .svm_family = AF_VSOCK, .svm_port = port, .svm_cid = VMADDR_CID_ANY};
    int fd = vsock_socket();

    if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || listen(fd, BACKLOG) < 0)
        die("vsock port");
    return fd;
}

static int watch_children(void)
{
    sigset_t set;
    int fd;

    /* What started the agent may ignore signals, as a shell does for "&": commands would inherit it,
     * and Ctrl-C on their terminal would do nothing. */
    for (int number = 1; number < NSIG; number++)
        signal(number, SIG_DFL);
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    sigprocmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
    fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (fd < 0)
        die("signalfd");
    return fd;
}

int main(int argc, char **argv)
{
    const char *path = NULL, *name = strrchr(argv[0], '/');
    unsigned port = AV_PORT;
    bool init_root = false, announce = false;
    int signals, listener;

    if (!strcmp(name ? name + 1 : argv[0], "avmm-agent-init"))
        av_init(argv);
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--unix") && i + 1 < argc) {
            path = argv[++i];
        } else if (!strcmp(argv[i], "--port") && i + 1 < argc) {
            port = (unsigned)strtoul(argv[++i], NULL, 10);
        } else if (!strcmp(argv[i], "--init-root")) {
            init_root = true;
        } else if (!strcmp(argv[i], "--announce")) {
            announce = true;
        } else {
            fprintf(stderr, "usage: avmm-agent [--port N | --unix PATH] [--init-root] [--announce]\n");
            return 2;
        }
    }
    av_null_open();
    if (init_root && (errno = -av_root_init()))
        die("proc");
    setenv("PATH", DEFAULT_PATH, 0);
    signals = watch_children();
    listener = path ? listen_unix(path) : listen_vsock(port);
    if (announce)
        (void)!write(1, "listening\n", 10);
    av_loop(listener, signals);
}
