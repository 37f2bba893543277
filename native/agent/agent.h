/* What the agent's files share. One thread; a session is one connection. */
#ifndef AV_AGENT_H
#define AV_AGENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "protocol.h"

/* A descriptor in the epoll set; its events go to `ready`. fd is -1 when it is in none. */
struct av_watch {
    int fd;
    uint32_t events;
    void (*ready)(struct av_watch *, uint32_t events);
    struct av_session *session;
};

/* Bytes at [at, end) of memory that grows on demand. */
struct av_buffer {
    unsigned char *bytes;
    size_t at, end, capacity;
};

enum av_state { AV_GREETING, AV_IDLE, AV_RUNNING, AV_WORKING, AV_REFUSED, AV_DEAD };

/* A command. `in` belongs to a pipe or, as `out` does, to the primary end of a terminal. */
struct av_command {
    pid_t pid; /* 0: reaped */
    bool tty;
    bool in_ended; /* the client's end of file came */
    bool hung; /* nobody has the terminal open at present */
    struct av_watch in, out, err;
    uint32_t credit[2]; /* bytes of stdout and stderr the client takes */
    struct av_buffer held; /* for stdin */
    uint32_t in_credit; /* bytes of stdin the client may still send */
    uint32_t in_taken; /* bytes of stdin not yet credited again */
};

struct av_session {
    struct av_watch connection;
    enum av_state state;
    struct av_buffer in, out;
    struct av_command command;
    pid_t worker;
    bool lasting; /* the worker outlives the connection */
    bool surplus; /* one too many */
};

/* --- loop.c --- */
int av_watch_set(struct av_watch *watch, uint32_t events);
void av_watch_close(struct av_watch *watch);
/* Some session has something to send: av_session_flush() comes when no event is waiting. */
void av_loop_unsent(void);
void av_loop(int listener, int signals) __attribute__((noreturn));
struct av_session *av_session_of(pid_t pid);

/* --- session.c --- */
struct av_session *av_session_create(int fd);
void av_session_end(struct av_session *session);
#define AV_UNSENT_MAX (64 * 1024) /* a client that does not listen is not listened to either */
void av_session_flush(struct av_session *session);
/* Queues a frame. */
void av_send(struct av_session *session, enum av_type type, const void *payload, size_t size);
void av_send_error(struct av_session *session, int error, const char *what);
void av_session_child(struct av_session *session, pid_t pid, int status);
/* To be called when a request was served to its end: the connection is free for the next. */
void av_session_idle(struct av_session *session);
bool av_buffer_append(struct av_buffer *buffer, const void *bytes, size_t size);
void av_buffer_free(struct av_buffer *buffer);

/* --- command.c --- */
void av_command_start(struct av_session *session, unsigned char *payload, size_t size);
/* A frame for a running command; false when it breaks the protocol. */
bool av_command_frame(struct av_session *session, uint8_t type, unsigned char *payload, size_t size);
void av_command_sent(struct av_session *session);
void av_command_child(struct av_session *session, int status);
void av_command_end(struct av_session *session);

/* --- spawn.c --- */
struct av_spawn {
    char **argv, **env;
    const char *cwd;
    uint32_t uid, gid;
    int in, out, err; /* become 0, 1, 2 */
    bool tty;
    const char *failed; /* what spawning failed at */
};
/* The pid, or -errno and `failed`. */
pid_t av_spawn(struct av_spawn *spawn);
extern int av_null_fd;
void av_null_open(void);

/* --- worker.c --- */
/* Forks a process that serves a request which may block, and has the connection meanwhile. */
void av_worker_start(struct av_session *session, uint8_t type, unsigned char *payload, size_t size);

/* --- wire.c: the connection as a worker has it, blocking --- */
/* early: what the agent has read already. */
void av_wire_begin(int fd, const struct av_buffer *early);
void av_wire_send(enum av_type type, const void *payload, size_t size);
/* The next frame's type; leaves the process when the client is gone or breaks the protocol. */
uint8_t av_wire_receive(unsigned char **payload, size_t *size);
void av_wire_ok(void);
/* Says why a request failed, and ends the worker in good order; an upload's client may be sending
 * for some time yet. */
void av_wire_fail(int error, const char *what) __attribute__((noreturn));
extern enum av_upload { AV_NO_UPLOAD, AV_UPLOADING, AV_UPLOADED } av_wire_upload;
/* Called before the worker leaves early; async-signal-safe. */
extern void (*av_wire_clean)(void);

/* --- files.c, transfer.c: run in workers --- */
void av_files_serve(uint8_t type, const struct av_file *file, const char *path, const char *other);
void av_transfer_read(const struct av_file *file, const char *path);
void av_transfer_write(const struct av_file *file, const char *path);
struct stat;
void av_stat_pack(struct av_stat *to, const struct stat *from);

/* --- root.c --- */
/* Where commands and files are looked up: this process's own root, or that of PID 1. */
int av_root_init(void);
/* A descriptor of PID 1's root now, or -1 when the agent's own is meant; -errno. */
int av_root_open(void);
/* In a child: makes it the root. root: from av_root_open(). 0 or -errno. */
int av_root_enter(int root);
/* A path inside that root, for the agent itself; descriptor or -errno. */
int av_root_open_file(int root, const char *path, int flags);
/* A file of proc, whatever is mounted where; descriptor or -errno. */
int av_proc_open(const char *path, int flags);

/* --- power.c --- */
void av_power_off(bool reboot) __attribute__((noreturn));

/* --- init.c --- */
void av_init(char **argv) __attribute__((noreturn));

#endif
