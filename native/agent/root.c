/*
 * Where the agent acts. Started from an initramfs, it keeps that as its root when PID 1 moves on
 * to the root of a disk (switch_root), while commands and files are meant to be PID 1's. So each
 * operation asks anew which root PID 1 has. The /proc to ask moves along with PID 1: ours is a
 * detached mount, which nobody else sees and which needs no place in any tree.
 */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <unistd.h>

static int proc_fd = -1;

int av_root_init(void)
{
    int context = (int)syscall(SYS_fsopen, "proc", 1 /* FSOPEN_CLOEXEC */);
    int result;

    if (context < 0)
        return -errno;
    if (syscall(SYS_fsconfig, context, 6 /* FSCONFIG_CMD_CREATE */, NULL, NULL, 0) < 0 ||
        (proc_fd = (int)syscall(SYS_fsmount, context, 1 /* FSMOUNT_CLOEXEC */, 0)) < 0)
        proc_fd = -errno;
    result = proc_fd < 0 ? proc_fd : 0;
    close(context);
    return result;
}

int av_root_open(void)
{
    int fd;

    if (proc_fd < 0)
        return -1;
    fd = openat(proc_fd, "1/root", O_PATH | O_DIRECTORY | O_CLOEXEC);
    /* -1 means something else to the caller; without privilege no errno of this is EPERM. */
    return fd >= 0 ? fd : errno == EPERM ? -EACCES : -errno;
}

int av_root_enter(int root)
{
    if (root < 0)
        return 0;
    return fchdir(root) < 0 || chroot(".") < 0 ? -errno : 0;
}

int av_root_open_file(int root, const char *path, int flags)
{
    struct open_how how = {.flags = (uint64_t)(flags | O_CLOEXEC), .resolve = RESOLVE_IN_ROOT};
    int fd = root < 0 ? open(path, flags | O_CLOEXEC)
                      : (int)syscall(SYS_openat2, root, path, &how, sizeof how);

    return fd < 0 ? -errno : fd;
}

int av_proc_open(const char *path, int flags)
{
    int base = proc_fd >= 0 ? proc_fd : open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC);
    int fd = openat(base, path, flags | O_CLOEXEC);

    fd = fd < 0 ? -errno : fd;
    if (base != proc_fd && base >= 0)
        close(base);
    return fd;
}
