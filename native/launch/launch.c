/* Starts a worker: `avmm-launch PROGRAM [ARGUMENT...]` runs it as the first process of new
 * namespaces, as a child of our own parent, and ends.
 *
 * It is given four descriptors: nothing to read or write (0), where it says how it went (1), the
 * worker's error output (2) and control socket (3). Whatever else it inherited is closed. What it
 * says is one line: `PID USER`, the user that the worker has to become, or -1 for none, or
 * `!OPERATION ERRNO`.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define REPORT_FD 1
#define FIRST_OTHER_FD 4

/* A worker's user is this plus its process id: no other process of the host has it. */
#define FIRST_USER 0x70000000ul
#define PIDS_MAX (4ul << 20) /* the kernel's own limit, whatever pid_max is */

static const int spaces =
    CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP;

static void fail(const char *op)
{
    dprintf(REPORT_FD, "!%s %d\n", op, errno);
    exit(1);
}

static void write_file(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);

    if (fd < 0 || write(fd, text, strlen(text)) != (ssize_t)strlen(text))
        fail(path);
    close(fd);
}

/* Whether the ids of all workers are there. They are not in most user namespaces, as of rootless
 * containers: root of one of those may make namespaces, but cannot become such a user. */
static int has_users(const char *map)
{
    unsigned long first, count;
    int found = 0;
    FILE *file = fopen(map, "re");

    if (!file)
        return 1; /* a kernel without user namespaces */
    while (!found && fscanf(file, "%lu %*u %lu", &first, &count) == 2)
        found = first <= FIRST_USER && FIRST_USER + PIDS_MAX <= first + count;
    fclose(file);
    return found;
}

/* Whether it may. */
static int enter_as_root(void)
{
    if (!has_users("/proc/self/uid_map") || !has_users("/proc/self/gid_map"))
        return 0;
    if (unshare(spaces) == 0)
        return 1;
    if (errno != EPERM)
        fail("unshare");
    return 0;
}

/* They come with a user namespace, whose only user is the one we are. */
static void enter_as_user(void)
{
    unsigned uid = getuid(), gid = getgid();
    char map[64];

    if (unshare(CLONE_NEWUSER | spaces) < 0)
        fail("unshare");
    write_file("/proc/self/setgroups", "deny");
    snprintf(map, sizeof(map), "0 %u 1", uid);
    write_file("/proc/self/uid_map", map);
    snprintf(map, sizeof(map), "0 %u 1", gid);
    write_file("/proc/self/gid_map", map);
}

static void become_worker(char **argv)
{
    /* Signals of the user's terminal are the parent's; and it ends with the parent. */
    setsid();
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    dup2(0, REPORT_FD);
    execv(argv[0], argv);
    fprintf(stderr, "%s: %s\n", argv[0], strerror(errno));
    _exit(127);
}

int main(int argc, char **argv)
{
    int root;
    long pid;

    if (argc < 2) {
        fprintf(stderr, "%s is started by avmm, for a microVM with isolation\n", argv[0]);
        return 2;
    }
    if (syscall(SYS_close_range, FIRST_OTHER_FD, ~0u, 0) < 0)
        fail("close_range");
    root = enter_as_root();
    if (!root)
        enter_as_user();
    /* Not a child of ours, which would need somebody to wait for it, but a sibling. */
    pid = syscall(SYS_clone, CLONE_PARENT | SIGCHLD, NULL, NULL, NULL, 0);
    if (pid < 0)
        fail("clone");
    if (pid == 0)
        become_worker(argv + 1);
    dprintf(REPORT_FD, "%ld %ld\n", pid, root ? (long)FIRST_USER + pid : -1l);
    return 0;
}
