/* A clean end of the guest. */
#define _GNU_SOURCE
#include "agent.h"

#include <dirent.h>
#include <fcntl.h>
#include <mntent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { GRACE_MS = 2000, STEP_MS = 20 };

static size_t read_proc(const char *path, char *text, size_t size)
{
    int fd = av_proc_open(path, O_RDONLY);
    ssize_t n = fd < 0 ? -1 : read(fd, text, size - 1);

    if (fd >= 0)
        close(fd);
    text[n > 0 ? n : 0] = 0;
    return n > 0 ? (size_t)n : 0;
}

/* Whether PID 1 has a handler for the signal. */
static bool init_handles(int sig)
{
    char status[4096], *line;
    unsigned long long caught = 0;

    read_proc("1/status", status, sizeof status);
    line = strstr(status, "\nSigCgt:");
    return line && sscanf(line, "\nSigCgt: %llx", &caught) == 1 && caught >> (sig - 1) & 1;
}

/*
 * Asks an init that is known to take requests by signal: systemd, which marks its presence in
 * /run, and busybox's, which handles both of its signals and is named init. A script as PID 1 is
 * neither, and everything else is told by no signal that means the same for all.
 */
static bool ask_init(bool reboot_too)
{
    char name[64];

    if (access("/run/systemd/system", F_OK) == 0)
        return kill(1, SIGRTMIN + (reboot_too ? 5 : 4)) == 0;
    read_proc("1/comm", name, sizeof name);
    if (!strcmp(name, "init\n") && init_handles(SIGUSR2) && init_handles(SIGTERM))
        return kill(1, reboot_too ? SIGTERM : SIGUSR2) == 0;
    return false;
}

static void pause_ms(long ms)
{
    struct timespec t = {.tv_nsec = ms * 1000000};

    nanosleep(&t, NULL);
}

/* Whether anything is left but PID 1, this process, and kernel threads, which have no arguments. */
static bool others_left(void)
{
    int fd = av_proc_open(".", O_RDONLY | O_DIRECTORY);
    DIR *processes = fd < 0 ? NULL : fdopendir(fd);
    struct dirent *entry;
    bool left = false;

    while (!left && processes && (entry = readdir(processes))) {
        long pid = strtol(entry->d_name, NULL, 10);
        char path[32], text[2];

        if (pid <= 1 || pid == getpid())
            continue;
        snprintf(path, sizeof path, "%ld/cmdline", pid);
        left = read_proc(path, text, sizeof text) > 0;
    }
    if (processes)
        closedir(processes);
    return left;
}

static void end_processes(void)
{
    kill(-1, SIGTERM); /* neither PID 1 nor the caller */
    for (int ms = 0; ms < GRACE_MS && others_left(); ms += STEP_MS)
        pause_ms(STEP_MS);
    kill(-1, SIGKILL);
}

/* File systems as if unmounted, as far as PID 1 itself does not write to them. */
static void settle_mounts(void)
{
    int fd = av_proc_open("1/mounts", O_RDONLY);
    FILE *mounts = fd < 0 ? NULL : fdopen(fd, "r");
    struct mntent *m;

    sync();
    while (mounts && (m = getmntent(mounts)))
        if (!strncmp(m->mnt_fsname, "/dev/", 5))
            mount(NULL, m->mnt_dir, NULL, MS_REMOUNT | MS_RDONLY, NULL);
    sync();
}

void av_power_off(bool reboot_too)
{
    int root = av_root_open();

    if (root >= 0)
        av_root_enter(root);
    if (!ask_init(reboot_too)) {
        end_processes();
        settle_mounts();
        reboot(reboot_too ? RB_AUTOBOOT : RB_POWER_OFF);
    }
    _exit(0);
}
