/* The walls of a worker process, raised from inside once all it needs is open and loaded.
 *
 * In this order: av_walls_root(), av_walls_identity(), av_walls_landlock(), av_walls_filter().
 * Each is for good. All but av_walls_filter() are for a process with a single thread.
 */
#ifndef AV_WALLS_H
#define AV_WALLS_H

#include <stdbool.h>
#include <stdint.h>

/* cdef begin */
/* What a thread does, from which its system calls follow. BUILD has those of all the others. */
enum av_role {
    AV_ROLE_BUILD,
    AV_ROLE_LOOP,
    AV_ROLE_VCPU,
    AV_ROLE_IO,
};

/* Make an empty, read-only folder the root; in a mount namespace of its own. 0 or -errno. */
int av_walls_root(void);
/* Become this user and group, without further groups, capabilities and the way back; -1 keeps the
 * user that it is. From then on the process dies with the thread that started it. 0 or -errno. */
int av_walls_identity(int64_t uid, int64_t gid);
/* Nothing more may be opened in any file system. The Landlock ABI that was used, 0 where the kernel
 * has none, or -errno. */
int av_walls_landlock(void);
/* Leave the calling thread, and those it starts, the system calls of a role. Roles add up: what one
 * forbids the next cannot allow. 0 or -errno. */
int av_walls_filter(enum av_role role);
/* cdef end */

/* Whether av_walls_filter() was called in this process. */
bool av_walls_up(void);
/* av_walls_filter() for a thread that has just begun, if the walls are up; aborts when it fails. */
void av_walls_thread(enum av_role role);

#endif
