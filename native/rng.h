/* The entropy device's one piece of work (virtio 1.3 section 5.4). */
#ifndef AV_RNG_H
#define AV_RNG_H

#include <stdint.h>

#include "home.h"
#include "vring.h"

/* cdef begin */
/* Fills available buffers with the host's random bytes. home and ring are borrowed. */
struct av_rng;
struct av_rng *av_rng_create(struct av_home *home, struct av_vring *ring, int *error);
void av_rng_destroy(struct av_rng *rng);         /* its lane is at rest */
struct av_lane *av_rng_lane(struct av_rng *rng); /* kick 0: the ring's */
/* cdef end */

#endif
