/*
 * The agent as the kernel's first program (rdinit=): starts itself beside, and goes on as the
 * init that the initramfs has, which a symbolic link names. It mounts nothing and loads nothing:
 * that init finds the machine as the kernel left it.
 */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define AGENT "/avmm-agent"
#define NEXT "/avmm-agent-next"

void av_init(char **argv)
{
    /* systemd ends what it finds running in an initramfs, but not what is named like this. */
    char *arguments[] = {(char[]){"@avmm-agent"}, (char[]){"--init-root"}, NULL};
    pid_t pid = fork();
    char next[256];
    ssize_t n;

    if (pid == 0) {
        setsid();
        execv(AGENT, arguments);
        _exit(127);
    }
    n = readlink(NEXT, next, sizeof next - 1);
    if (n > 0) {
        next[n] = 0;
        argv[0] = next;
        execv(next, argv);
    }
    fprintf(stderr, "avmm-agent: the initramfs has no %s: %s\n", n > 0 ? next : NEXT,
            strerror(errno));
    _exit(1);
}
