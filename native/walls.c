#define _GNU_SOURCE
#include "walls.h"
#include "walls_filter.h"

#include <errno.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/landlock.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

int av_walls_root(void)
{
    /* Any folder does that every host has: the mount on it is seen by this process alone. */
    static const char place[] = "/dev";
    const unsigned long flags = MS_NOSUID | MS_NODEV | MS_NOEXEC;

    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ||
        mount("none", place, "tmpfs", flags, "size=4k,nr_inodes=1,mode=0555") < 0 ||
        chdir(place) < 0 || syscall(SYS_pivot_root, ".", ".") < 0 ||
        umount2(".", MNT_DETACH) < 0 || chdir("/") < 0 ||
        mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | flags, NULL) < 0)
        return -errno;
    return 0;
}

static int drop_capabilities(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct none[_LINUX_CAPABILITY_U32S_3] = {{0}};

    return syscall(SYS_capset, &header, none) < 0 ? -errno : 0;
}

int av_walls_identity(int64_t uid, int64_t gid)
{
    int result;

    if (uid >= 0 && (setgroups(0, NULL) < 0 ||
                     setresgid((gid_t)gid, (gid_t)gid, (gid_t)gid) < 0 ||
                     setresuid((uid_t)uid, (uid_t)uid, (uid_t)uid) < 0))
        return -errno;
    result = drop_capabilities();
    if (result < 0)
        return result;
    /* After the change of user, which would undo both. */
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 || prctl(PR_SET_DUMPABLE, 0) < 0 ||
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        return -errno;
    return 0;
}

/* The rights of files that each ABI has: the first n bits. Later ones add ports (4) and scopes (6),
 * in fields of their own behind; a kernel that does not know them wants a shorter structure. */
#define FS_BITS_MAX 16
#define NET_BITS 2
#define SCOPE_BITS 2

struct ruleset {
    uint64_t fs;
    uint64_t net;
    uint64_t scoped;
};

int av_walls_landlock(void)
{
    static const int fs_bits[] = {0, 13, 14, 15, 15, FS_BITS_MAX};
    struct ruleset rules = {0};
    size_t size = sizeof(rules.fs);
    int fd, result, abi;

    abi = (int)syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION);
    if (abi < 0)
        return errno == ENOSYS || errno == EOPNOTSUPP ? 0 : -errno;
    rules.fs = (1ull << fs_bits[abi < 5 ? abi : 5]) - 1;
    if (abi >= 4) {
        rules.net = (1ull << NET_BITS) - 1;
        size += sizeof(rules.net);
    }
    if (abi >= 6) {
        rules.scoped = (1ull << SCOPE_BITS) - 1;
        size += sizeof(rules.scoped);
    }
    fd = (int)syscall(SYS_landlock_create_ruleset, &rules, size, 0);
    if (fd < 0)
        return -errno;
    result = syscall(SYS_landlock_restrict_self, fd, 0) < 0 ? -errno : abi;
    close(fd);
    return result;
}

static atomic_bool up;

bool av_walls_up(void)
{
    return atomic_load(&up);
}

int av_walls_filter(enum av_role role)
{
    int result = av_walls_install(role);

    if (result == 0)
        atomic_store(&up, true);
    return result;
}

void av_walls_thread(enum av_role role)
{
    if (av_walls_up() && av_walls_install(role) < 0)
        abort(); /* out of memory; without its filter the thread must not go on */
}
