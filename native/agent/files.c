/* Requests about names: list, stat, mkdir, remove, rename, chmod. */
#define _GNU_SOURCE
#include "agent.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { WALK_DESCRIPTORS = 32, LIST_CHUNK = 32 * 1024 };

static int64_t nanoseconds(struct timespec t)
{
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

void av_stat_pack(struct av_stat *to, const struct stat *from)
{
    *to = (struct av_stat){
        .mode = from->st_mode,
        .uid = from->st_uid,
        .gid = from->st_gid,
        .links = (uint32_t)from->st_nlink,
        .size = (uint64_t)from->st_size,
        .inode = from->st_ino,
        .accessed_ns = nanoseconds(from->st_atim),
        .modified_ns = nanoseconds(from->st_mtim),
        .changed_ns = nanoseconds(from->st_ctim),
    };
}

static void reply(int result, const char *path)
{
    if (result < 0)
        av_wire_fail(errno, path);
    av_wire_ok();
}

static void serve_stat(const struct av_file *file, const char *path)
{
    struct stat st;
    struct av_stat packed;

    if ((file->flags & AV_FOLLOW ? stat(path, &st) : lstat(path, &st)) < 0)
        av_wire_fail(errno, path);
    av_stat_pack(&packed, &st);
    av_wire_send(AV_OK, &packed, sizeof packed);
}

/* DATA frames of entries: struct av_stat, then the name with its NUL. */
static void serve_list(const char *path)
{
    static unsigned char bytes[LIST_CHUNK + sizeof(struct av_stat) + NAME_MAX + 1];
    DIR *dir = opendir(path);
    struct dirent *entry;
    size_t used = 0;

    if (!dir)
        av_wire_fail(errno, path);
    av_wire_ok();
    while ((errno = 0, entry = readdir(dir))) {
        struct av_stat packed;
        struct stat st;
        size_t length = strlen(entry->d_name) + 1;

        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
            continue;
        if (fstatat(dirfd(dir), entry->d_name, &st, AT_SYMLINK_NOFOLLOW) < 0)
            continue; /* removed in between */
        av_stat_pack(&packed, &st);
        memcpy(bytes + used, &packed, sizeof packed);
        memcpy(bytes + used + sizeof packed, entry->d_name, length);
        used += sizeof packed + length;
        if (used > LIST_CHUNK) {
            av_wire_send(AV_DATA, bytes, used);
            used = 0;
        }
    }
    if (errno)
        av_wire_fail(errno, path);
    if (used)
        av_wire_send(AV_DATA, bytes, used);
    av_wire_send(AV_END, NULL, 0);
    closedir(dir);
}

static int make_parents(const char *path, mode_t mode)
{
    char part[PATH_MAX];
    size_t length = strlen(path);

    if (length >= sizeof part) {
        errno = ENAMETOOLONG;
        return -1;
    }
    for (size_t i = 1; i < length; i++) {
        if (path[i] != '/')
            continue;
        memcpy(part, path, i);
        part[i] = 0;
        if (mkdir(part, 0777) < 0 && errno != EEXIST && errno != EROFS)
            return -1;
    }
    if (mkdir(path, mode) == 0)
        return 0;
    struct stat st;
    if (errno == EEXIST && stat(path, &st) == 0 && S_ISDIR(st.st_mode))
        return 0;
    return -1;
}

static int remove_one(const char *path, const struct stat *st, int kind, struct FTW *walk)
{
    (void)st;
    (void)walk;
    return kind == FTW_DP || kind == FTW_DNR ? rmdir(path) : unlink(path);
}

static int remove_path(const struct av_file *file, const char *path)
{
    struct stat st;
    int result = lstat(path, &st);

    if (result == 0 && !S_ISDIR(st.st_mode))
        result = unlink(path);
    else if (result == 0 && file->flags & AV_RECURSIVE)
        result = nftw(path, remove_one, WALK_DESCRIPTORS, FTW_DEPTH | FTW_PHYS | FTW_MOUNT);
    else if (result == 0)
        result = rmdir(path);
    return result < 0 && errno == ENOENT && file->flags & AV_MISSING_OK ? 0 : result;
}

void av_files_serve(uint8_t type, const struct av_file *file, const char *path, const char *other)
{
    mode_t mode = file->mode == AV_NONE ? 0777 : file->mode & 07777;

    umask(022);
    switch (type) {
    case AV_STAT:
        serve_stat(file, path);
        break;
    case AV_LIST:
        serve_list(path);
        break;
    case AV_MKDIR:
        reply(file->flags & AV_PARENTS ? make_parents(path, mode) : mkdir(path, mode), path);
        break;
    case AV_REMOVE:
        reply(remove_path(file, path), path);
        break;
    case AV_RENAME:
        reply(rename(path, other), path);
        break;
    case AV_CHMOD:
        reply(chmod(path, mode), path);
        break;
    }
}
