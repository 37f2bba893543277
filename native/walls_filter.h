/* The system calls of each role, as a seccomp filter. */
#ifndef AV_WALLS_FILTER_H
#define AV_WALLS_FILTER_H

#include "walls.h"

/* Install it for the calling thread; 0 or -errno. no_new_privs has to be set. */
int av_walls_install(enum av_role role);

#endif
