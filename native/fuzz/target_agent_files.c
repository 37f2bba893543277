/* Requests for files, as workers of the guest's agent serve them: each on a connection of its own,
 * in a folder with files, folders and links. Paths stay in it: they are made of names without "..",
 * and no link leads out. */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <setjmp.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fuzz.h"
#include "host.h"

#include "agent/worker.c" /* for perform() */

enum { FDS = 64, CONTENT_MAX = 8192, ANSWER_MAX = 65536, GOES_ON = -1 };

static char folder[64];
static bool in_use[FDS]; /* descriptors that are not of a request's */
static int folder_fd, before_fd;

/* What the worker's process would end with; GOES_ON when it did not end. */
static jmp_buf process_ends;
static int ended;

void fuzz__exit(int status)
{
    ended = status;
    longjmp(process_ends, 1);
}

int fuzz_kill(pid_t pid, int number)
{
    (void)pid;
    (void)number;
    abort(); /* a worker signals nobody */
}

/* --- the folder ------------------------------------------------------------------------ */

/* All there is in a folder, by descriptors: a path to it may be longer than a path may be. */
static void walk(int dir_fd, void (*each)(int dir_fd, const char *name, bool is_folder))
{
    DIR *dir = fdopendir(dir_fd);
    struct dirent *entry;

    CHECK(dir != NULL);
    while ((entry = readdir(dir)) != NULL) {
        bool is_folder = entry->d_type == DT_DIR;

        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        if (is_folder)
            walk(openat(dir_fd, entry->d_name, O_RDONLY | O_DIRECTORY | O_CLOEXEC), each);
        each(dir_fd, entry->d_name, is_folder);
    }
    closedir(dir);
}

static void remove_entry(int dir_fd, const char *name, bool is_folder)
{
    CHECK(unlinkat(dir_fd, name, is_folder ? AT_REMOVEDIR : 0) == 0);
}

static void is_no_temporary(int dir_fd, const char *name, bool is_folder)
{
    (void)dir_fd;
    (void)is_folder;
    CHECK(strncmp(name, ".avmm-", 6) != 0);
}

static void empty(void)
{
    walk(open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC), remove_entry);
}

static void remove_folder(void)
{
    empty();
    rmdir(folder);
}

static void write_file(const char *path, const void *bytes, size_t size)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);

    CHECK(fd >= 0 && write(fd, bytes, size) == (ssize_t)size);
    close(fd);
}

static void fill(void)
{
    CHECK(mkdir("d", 0755) == 0);
    write_file("a", "aaaaaaaa", 8);
    write_file("d/f", "f", 1);
    CHECK(symlink("d/f", "l") == 0 && symlink("loop", "loop") == 0 && symlink("d", "s") == 0);
}

static void begin(void)
{
    static bool begun;

    if (!begun) {
        snprintf(folder, sizeof folder, "%s/avmm-fuzz-files.XXXXXX",
                 access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp"); /* syncing costs nothing */
        CHECK(mkdtemp(folder) != NULL);
        folder_fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        before_fd = open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        CHECK(folder_fd >= 0 && before_fd >= 0);
        for (int fd = 0; fd < FDS; fd++)
            in_use[fd] = fcntl(fd, F_GETFD) >= 0;
        atexit(remove_folder);
        begun = true;
    }
    CHECK(fchdir(folder_fd) == 0);
    fill();
}

/* The end of a process closes what it had open. */
static void close_those_of_the_request(void)
{
    for (int fd = 0; fd < FDS; fd++)
        if (!in_use[fd])
            close(fd);
}

/* A regular file's content; -1 when it is none. */
static ssize_t content(const char *path, uint8_t *to)
{
    struct stat st;
    ssize_t size = -1;
    int fd;

    if (stat(path, &st) < 0 || !S_ISREG(st.st_mode))
        return -1;
    fd = open(path, O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0);
    size = read(fd, to, CONTENT_MAX);
    CHECK(size >= 0);
    close(fd);
    return size;
}

/* --- a client -------------------------------------------------------------------------- */

/* A path of `names` and slashes, and its NUL. */
static size_t make_path(struct fuzz_input *in, char *to, size_t room)
{
    static const char *const names[] = { "a", "d", "f", "l", "loop", "s", "n", ".", "", NULL };
    uint32_t count = 1 + fuzz_below(in, 6);
    size_t used = 0;

    if (fuzz_u8(in) == 0xff) /* longer than a path may be */
        count = 255;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t which = fuzz_below(in, 10);
        size_t length = names[which] != NULL ? strlen(names[which]) : 1 + fuzz_u8(in);

        if (used + 1 + length + 1 > room)
            break;
        if (used != 0)
            to[used++] = '/';
        if (names[which] != NULL)
            memcpy(to + used, names[which], length);
        else
            memset(to + used, 'x', length);
        used += length;
    }
    to[used] = 0;
    return used + 1;
}

struct request {
    uint8_t type;
    struct av_file file;
    char path[2 * PATH_MAX], other[2 * PATH_MAX];
    size_t path_size, other_size;
    uint8_t sent[CONTENT_MAX]; /* an upload's bytes, as far as they came */
    size_t sent_size;
    bool knows_sent; /* and are all there were */
};

static void choose(struct fuzz_input *in, struct request *r)
{
    static const uint8_t types[] = { AV_READ,   AV_WRITE,  AV_WRITE, AV_LIST,  AV_STAT,
                                     AV_MKDIR,  AV_REMOVE, AV_RENAME, AV_CHMOD };

    r->type = types[fuzz_below(in, sizeof types)];
    r->file = (struct av_file){ .flags = fuzz_u8(in), .mode = AV_NONE, .size = UINT64_MAX };
    if (r->type == AV_READ && r->file.flags & 0x80) {
        r->file.offset = fuzz_number(in);
        r->file.size = fuzz_number(in);
    } else if (r->type != AV_READ && r->file.flags & 0x80) {
        r->file.mode = fuzz_u32(in) | 0700; /* or who runs this could not tidy up */
    }
    r->path_size = make_path(in, r->path, sizeof r->path);
    r->other_size = r->type == AV_RENAME ? make_path(in, r->other, sizeof r->other) : 0;
    r->sent_size = 0;
    r->knows_sent = true;
}

static void put(int client, struct av_buffer *early, uint8_t type, const void *bytes, size_t size)
{
    struct av_head head = { .size = (uint32_t)size, .type = type };

    if (early->end + sizeof head + size <= early->capacity) { /* the agent had it already */
        memcpy(early->bytes + early->end, &head, sizeof head);
        if (size != 0)
            memcpy(early->bytes + early->end + sizeof head, bytes, size);
        early->end += sizeof head + size;
        return;
    }
    early->capacity = early->end; /* what comes later comes behind it */
    CHECK(send(client, &head, sizeof head, MSG_NOSIGNAL) == sizeof head);
    CHECK(send(client, bytes, size, MSG_NOSIGNAL) == (ssize_t)size);
}

/* What follows a request to write: a file's bytes, its end, or anything, or nothing more. */
static void upload(int client, struct fuzz_input *in, struct request *r, struct av_buffer *early)
{
    while (fuzz_more(in)) {
        uint8_t how = fuzz_u8(in), bytes[512];
        size_t size = how < 0xe0 ? how & 0x3f : fuzz_u16(in) % sizeof bytes;

        switch (how >> 6) {
        case 0:
        case 1:
            if (r->sent_size + size > sizeof r->sent)
                return;
            fuzz_bytes(in, r->sent + r->sent_size, size);
            put(client, early, AV_DATA, r->sent + r->sent_size, size);
            r->sent_size += size;
            break;
        case 2:
            put(client, early, AV_END, NULL, 0);
            return;
        default:
            fuzz_bytes(in, bytes, size);
            r->knows_sent = false; /* it may be more of the file, and its end */
            if (how & 1)
                put(client, early, fuzz_u8(in), bytes, size);
            else
                CHECK(send(client, bytes, size, MSG_NOSIGNAL) == (ssize_t)size);
            return;
        }
    }
}

/* The frames of an answer, one by one, as a letter each. */
static void read_answer(int client, char *letters, size_t room)
{
    static const char by_type[] = { [AV_OK] = 'O', [AV_ERROR] = 'F', [AV_DATA] = 'D', [AV_END] = 'E' };
    static uint8_t bytes[ANSWER_MAX];
    ssize_t size = recv(client, bytes, sizeof bytes, MSG_DONTWAIT);
    size_t at = 0, count = 0;

    while (size > 0 && at < (size_t)size) {
        struct av_head head;

        CHECK((size_t)size - at >= sizeof head);
        memcpy(&head, bytes + at, sizeof head);
        CHECK(head.type >= AV_OK && head.type <= AV_END && head.size <= (size_t)size - at - sizeof head);
        CHECK(head.type != AV_ERROR || head.size >= 4);
        at += sizeof head + head.size;
        CHECK(count + 1 < room);
        letters[count++] = by_type[head.type];
    }
    letters[count] = 0;
}

/* --- what has to hold ------------------------------------------------------------------ */

static void check_answer(uint8_t type, const char *letters)
{
    size_t data = strspn(letters + (*letters == 'O'), "D");
    const char *rest = letters + (*letters == 'O') + data;

    switch (type) {
    case AV_READ:
    case AV_LIST:
        CHECK(strcmp(letters, "F") == 0 ||
              (*letters == 'O' && (strcmp(rest, "E") == 0 || strcmp(rest, "F") == 0)));
        break;
    case AV_WRITE:
        CHECK(strcmp(letters, "O") == 0 || strcmp(letters, "FE") == 0);
        break;
    default:
        CHECK(strcmp(letters, "O") == 0 || strcmp(letters, "F") == 0);
    }
}

static void check_written(const struct request *r, const char *letters, const uint8_t *old,
                          ssize_t old_size)
{
    static uint8_t now[CONTENT_MAX];
    ssize_t size = content(r->path, now);

    if (*letters == 'O' && !(r->file.flags & AV_APPEND && !(r->file.flags & AV_ATOMIC))) {
        CHECK(!r->knows_sent || size == (ssize_t)r->sent_size);
        CHECK(!r->knows_sent || memcmp(now, r->sent, r->sent_size) == 0);
    } else if (*letters != 'O' && r->file.flags & AV_ATOMIC) {
        CHECK(size == old_size && (size <= 0 || memcmp(now, old, (size_t)size) == 0));
    }
}

static void serve_one(struct fuzz_input *in)
{
    static uint8_t old[CONTENT_MAX];
    static struct request r;
    struct av_buffer early = { .capacity = fuzz_u8(in) };
    unsigned char *payload;
    size_t payload_size;
    ssize_t old_size;
    char letters[64];
    int ends[2];

    choose(in, &r);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    early.bytes = malloc(early.capacity);
    payload_size = sizeof r.file + r.path_size + r.other_size;
    payload = malloc(payload_size);
    CHECK(early.bytes != NULL && payload != NULL);
    memcpy(payload, &r.file, sizeof r.file);
    memcpy(payload + sizeof r.file, r.path, r.path_size);
    memcpy(payload + sizeof r.file + r.path_size, r.other, r.other_size);
    if (r.type == AV_WRITE)
        upload(ends[1], in, &r, &early);
    shutdown(ends[1], SHUT_WR);
    old_size = content(r.path, old);

    av_wire_upload = AV_NO_UPLOAD;
    av_wire_clean = NULL;
    ended = GOES_ON;
    if (setjmp(process_ends) == 0) {
        av_wire_begin(ends[0], &early);
        perform(r.type, payload, payload_size);
    }
    read_answer(ends[1], letters, sizeof letters);
    if (ended != 1) /* 1: the client left, or broke the protocol */
        check_answer(r.type, letters);
    if (r.type == AV_WRITE)
        check_written(&r, letters, old, old_size);
    walk(open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC), is_no_temporary);
    free(payload);
    free(early.bytes);
    close_those_of_the_request();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input in = { data, size };

    begin();
    while (fuzz_more(&in))
        serve_one(&in);
    empty();
    CHECK(fchdir(before_fd) == 0);
    return 0;
}
