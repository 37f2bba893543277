/*
 * The wire format of docs/agent-protocol.md: the one place of it on the guest's side.
 * All numbers are little-endian, as x86-64 and AArch64 have them.
 */
#ifndef AV_AGENT_PROTOCOL_H
#define AV_AGENT_PROTOCOL_H

#include <stdint.h>

enum {
    AV_VERSION = 1,
    AV_PORT = 1024,
    AV_FRAME_MAX = 256 * 1024, /* payload bytes */
    AV_STDIN_WINDOW = 256 * 1024,
    AV_SESSIONS_MAX = 256,
    AV_SURPLUS_MAX = 32, /* connections beyond, which are told that they are */
};

#define AV_MAGIC "avmm"
#define AV_NONE UINT32_MAX /* a uid, gid, mode or count that is not given */

enum av_type {
    AV_HELLO = 1,
    AV_OK = 2,
    AV_ERROR = 3,
    AV_DATA = 4,
    AV_END = 5,

    AV_PING = 0x10,
    AV_SET_CLOCK = 0x11,
    AV_SHUTDOWN = 0x12,
    AV_EXEC = 0x20,
    AV_READ = 0x30,
    AV_WRITE = 0x31,
    AV_LIST = 0x32,
    AV_STAT = 0x33,
    AV_MKDIR = 0x34,
    AV_REMOVE = 0x35,
    AV_RENAME = 0x36,
    AV_CHMOD = 0x37,

    AV_STARTED = 0x40,
    AV_STDIN = 0x41,
    AV_STDOUT = 0x42,
    AV_STDERR = 0x43,
    AV_WINDOW = 0x44,
    AV_SIGNAL = 0x45,
    AV_RESIZE = 0x46,
    AV_EXITED = 0x47,
};

struct av_head {
    uint32_t size; /* of the payload that follows */
    uint8_t type;
    uint8_t zero[3];
};
_Static_assert(sizeof(struct av_head) == 8, "wire format");

struct av_hello {
    char magic[4];
    uint16_t version;
    uint16_t zero;
};
_Static_assert(sizeof(struct av_hello) == 8, "wire format");

struct av_clock {
    int64_t seconds;
    uint32_t nanoseconds;
    uint32_t zero;
};
_Static_assert(sizeof(struct av_clock) == 16, "wire format");

enum {
    AV_TTY = 1,
    AV_IN_NULL = 2,
    AV_OUT_NULL = 4,
    AV_ERR_NULL = 8,
    AV_ERR_TO_OUT = 16,
    AV_ENV_ADDED = 32, /* to the agent's own */
};

/* Followed by NUL-terminated strings: cwd ("" for /), argv, env. */
struct av_exec {
    uint32_t flags;
    uint32_t uid, gid;
    uint16_t rows, columns;
    uint32_t window; /* bytes of stdout, and as many of stderr, that may be sent unasked */
    uint32_t arguments;
    uint32_t variables; /* AV_NONE: the agent's own environment */
};
_Static_assert(sizeof(struct av_exec) == 28, "wire format");

struct av_window {
    uint32_t stream; /* AV_STDIN, AV_STDOUT, AV_STDERR */
    uint32_t bytes;
};

enum { AV_CODE = 0, AV_KILLED = 1 };

struct av_exited {
    uint32_t how;
    uint32_t value; /* exit code or signal number */
};

enum {
    AV_ATOMIC = 1, /* write */
    AV_APPEND = 2,
    AV_NEW = 4,
    AV_FOLLOW = 1, /* stat */
    AV_PARENTS = 1, /* mkdir: with what leads there, and it may be there already */
    AV_RECURSIVE = 1, /* remove */
    AV_MISSING_OK = 2,
};

/* Of every file request; followed by the path, NUL-terminated, for rename by the new one too. */
struct av_file {
    uint32_t flags;
    uint32_t mode;
    uint64_t offset, size; /* read: from where, at most how many bytes */
};
_Static_assert(sizeof(struct av_file) == 24, "wire format");

struct av_stat {
    uint32_t mode, uid, gid, links;
    uint64_t size, inode;
    int64_t accessed_ns, modified_ns, changed_ns;
};
_Static_assert(sizeof(struct av_stat) == 56, "wire format");

#endif
