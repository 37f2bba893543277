/* The entropy device's one piece of work (virtio 1.3 section 5.4). */
#ifndef AV_RNG_H
#define AV_RNG_H

#include <stdint.h>

#include "vring.h"

/* cdef begin */
/* Fill available buffers with the host's random bytes, at most budget_bytes of them and at least
 * one buffer; drains kick_fd. 1 when there may be more to do, 0 when not, -EPROTO or -errno. */
int av_rng_kick(struct av_vring *ring, int kick_fd, uint32_t budget_bytes);
/* cdef end */

#endif
