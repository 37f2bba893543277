/* A file's content, down to the client and up from it. */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

enum { DEFAULT_MODE = 0644 };

static char temporary[PATH_MAX + 32]; /* "" when there is none */

void av_transfer_read(const struct av_file *file, const char *path)
{
    static unsigned char bytes[AV_FRAME_MAX];
    uint64_t left = file->size;
    struct av_stat packed;
    struct stat st;
    ssize_t n = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY);

    if (fd < 0 || fstat(fd, &st) < 0)
        av_wire_fail(errno, path);
    if (S_ISDIR(st.st_mode))
        av_wire_fail(EISDIR, path);
    if (file->offset && lseek(fd, (off_t)file->offset, SEEK_SET) < 0)
        av_wire_fail(errno, path);
    av_stat_pack(&packed, &st);
    av_wire_send(AV_OK, &packed, sizeof packed);
    while (left > 0) {
        n = read(fd, bytes, left < sizeof bytes ? (size_t)left : sizeof bytes);
        if (n <= 0)
            break;
        left -= (uint64_t)n;
        av_wire_send(AV_DATA, bytes, (size_t)n);
    }
    if (n < 0)
        av_wire_fail(errno, path);
    av_wire_send(AV_END, NULL, 0);
}

static void remove_temporary(void)
{
    if (*temporary)
        unlink(temporary);
    *temporary = 0;
}

static int write_all(int fd, const unsigned char *bytes, size_t size)
{
    while (size > 0) {
        ssize_t n = write(fd, bytes, size);
        if (n < 0 && errno != EINTR)
            return -1;
        if (n > 0) {
            bytes += n;
            size -= (size_t)n;
        }
    }
    return 0;
}

/* The folder of `path`, "." when it names none; false when it is too long. */
static bool folder_of(const char *path, char *folder, size_t size)
{
    const char *slash = strrchr(path, '/');
    size_t length = slash ? (size_t)(slash - path) + (slash == path) : 1;

    if (length >= size)
        return false;
    memcpy(folder, slash ? path : ".", length);
    folder[length] = 0;
    return true;
}

/* A new file beside `target`, under a name that says nothing of it: that may be 255 bytes long. */
static int open_temporary(const char *target)
{
    char folder[PATH_MAX];
    uint64_t number = 0;
    int fd = -1;

    if (!folder_of(target, folder, sizeof folder)) {
        errno = ENAMETOOLONG;
        return -1;
    }
    av_wire_clean = remove_temporary;
    for (int tries = 0; fd < 0 && tries < 8; tries++) {
        char name[sizeof temporary];
        (void)!getrandom(&number, sizeof number, 0);
        snprintf(name, sizeof name, "%s/.avmm-%016llx", folder, (unsigned long long)number);
        fd = open(name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        if (fd < 0 && errno != EEXIST)
            break;
        if (fd >= 0)
            strcpy(temporary, name);
    }
    return fd;
}

/* Owner and mode of what it takes the place of, or the mode that was asked for. */
static int settle(int fd, const struct av_file *file, const struct stat *old)
{
    mode_t mode = file->mode != AV_NONE ? file->mode & 07777 : DEFAULT_MODE;

    if (old && fchown(fd, old->st_uid, old->st_gid) < 0 && errno != EPERM)
        return -1;
    if (old && file->mode == AV_NONE)
        mode = old->st_mode & 07777;
    return fchmod(fd, mode);
}

/* After a crash of the guest the name means the old content or the new, never a part. */
static int replace(int fd, const char *target)
{
    char folder[PATH_MAX];
    int result, dir;

    if (fsync(fd) < 0 || rename(temporary, target) < 0)
        return -1;
    *temporary = 0;
    folder_of(target, folder, sizeof folder);
    dir = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (dir < 0)
        return -1;
    result = fsync(dir);
    close(dir);
    return result < 0 && errno == EINVAL ? 0 : result; /* a file system that has nothing to sync */
}

static int receive_into(int fd)
{
    unsigned char *payload;
    size_t size;
    uint8_t type;

    while ((type = av_wire_receive(&payload, &size)) == AV_DATA)
        if (write_all(fd, payload, size) < 0)
            return -1;
    if (type != AV_END) {
        remove_temporary();
        _exit(1);
    }
    av_wire_upload = AV_UPLOADED;
    return 0;
}

static void write_atomic(const struct av_file *file, const char *path)
{
    static char real[PATH_MAX];
    /* A symbolic link stays one: what it points to is replaced. */
    const char *target = realpath(path, real) ? real : path;
    struct stat st, *old = stat(target, &st) == 0 ? &st : NULL;
    int fd;

    if (old && !S_ISREG(st.st_mode))
        av_wire_fail(S_ISDIR(st.st_mode) ? EISDIR : EINVAL, path);
    if (old && file->flags & AV_NEW)
        av_wire_fail(EEXIST, path);
    fd = open_temporary(target);
    if (fd < 0 || receive_into(fd) < 0 || settle(fd, file, old) < 0 || replace(fd, target) < 0)
        av_wire_fail(errno, path);
    close(fd);
}

static void write_in_place(const struct av_file *file, const char *path)
{
    int flags = O_WRONLY | O_CREAT | O_CLOEXEC | O_NOCTTY;
    mode_t mode = file->mode != AV_NONE ? file->mode & 07777 : DEFAULT_MODE;
    int fd;

    flags |= file->flags & AV_APPEND ? O_APPEND : O_TRUNC;
    flags |= file->flags & AV_NEW ? O_EXCL : 0;
    fd = open(path, flags, mode);
    if (fd < 0 || receive_into(fd) < 0)
        av_wire_fail(errno, path);
    if (file->mode != AV_NONE && fchmod(fd, mode) < 0)
        av_wire_fail(errno, path);
    if (close(fd) < 0)
        av_wire_fail(errno, path);
}

void av_transfer_write(const struct av_file *file, const char *path)
{
    av_wire_upload = AV_UPLOADING;
    umask(022);
    if (file->flags & AV_ATOMIC)
        write_atomic(file, path);
    else
        write_in_place(file, path);
    av_wire_ok();
}
