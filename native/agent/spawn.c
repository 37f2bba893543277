/* Starts a command: in PID 1's root, as the user asked for, in a session of its own. */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

enum { PATH_BYTES = 4096 };

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

int av_null_fd = -1;

/* Also where there is no /dev yet; and descriptors 0 to 2 are taken from now on, so that none of
 * ours is mistaken for one of them. */
void av_null_open(void)
{
    int fd = open("/dev/null", O_RDWR | O_CLOEXEC);

    if (fd < 0 && mknod("/.avmm-null", S_IFCHR | 0600, makedev(1, 3)) == 0) {
        fd = open("/.avmm-null", O_RDWR | O_CLOEXEC);
        unlink("/.avmm-null");
    }
    while (fd >= 0 && fd < 3) {
        fcntl(fd, F_SETFD, 0);
        fd = fcntl(fd, F_DUPFD, 0);
    }
    if (fd >= 0)
        fcntl(fd, F_SETFD, FD_CLOEXEC);
    av_null_fd = fd;
}

static const char *search_path(char **env)
{
    for (; *env; env++)
        if (!strncmp(*env, "PATH=", 5))
            return *env + 5;
    return DEFAULT_PATH;
}

/* As a shell looks a command up; returns the errno that says most. */
static int run(struct av_spawn *c)
{
    char path[PATH_BYTES];
    int error = ENOENT;

    if (strchr(c->argv[0], '/')) {
        execve(c->argv[0], c->argv, c->env);
        return errno;
    }
    for (const char *at = search_path(c->env), *end; *c->argv[0]; at = end + 1) {
        end = strchrnul(at, ':');
        int n = snprintf(path, sizeof path, "%.*s%s%s", (int)(end - at), at,
                         end > at ? "/" : "", c->argv[0]);
        if (n < (int)sizeof path) {
            execve(path, c->argv, c->env);
            if (errno != ENOENT && errno != ENOTDIR)
                error = errno;
        }
        if (!*end)
            break;
    }
    return error;
}

static int become(uint32_t uid, uint32_t gid)
{
    gid_t group = gid;

    if (gid != AV_NONE && (setgroups(1, &group) < 0 || setresgid(gid, gid, gid) < 0))
        return -errno;
    if (uid != AV_NONE && setresuid(uid, uid, uid) < 0)
        return -errno;
    return 0;
}

/* In the child; the parent waits and shares its memory, so nothing here may allocate or return
 * but by _exit. 0 never comes back: an errno. */
static int prepare_and_run(struct av_spawn *c, int root)
{
    sigset_t none;
    int result;

    c->failed = "session";
    setsid();
    if (c->tty && ioctl(c->in, TIOCSCTTY, 0) < 0)
        return errno;
    if (dup2(c->in, 0) < 0 || dup2(c->out, 1) < 0 || dup2(c->err, 2) < 0)
        return errno;
    c->failed = "root";
    if ((result = av_root_enter(root)) < 0)
        return -result;
    c->failed = "user";
    if ((result = become(c->uid, c->gid)) < 0)
        return -result;
    c->failed = c->cwd;
    if (*c->cwd && chdir(c->cwd) < 0)
        return errno;
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* forgotten at a change of user, hence so late */
    signal(SIGPIPE, SIG_DFL);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    c->failed = c->argv[0];
    return run(c);
}

/* vfork: a fork copies page tables, which is most of the cost of a short command. */
pid_t av_spawn(struct av_spawn *c)
{
    volatile int error = 0;
    int root = av_root_open();
    pid_t pid;

    c->failed = "root";
    if (root < -1)
        return root;
    c->failed = "fork";
    pid = vfork();
    if (pid == 0) {
        error = prepare_and_run(c, root);
        _exit(127);
    }
    if (pid < 0)
        error = errno;
    if (root >= 0)
        close(root);
    return error ? -error : pid;
}
