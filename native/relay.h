/* Passes on what somebody else's datapath, as the kernel's vhost, has to say to the driver, where
 * an interrupt is more than an eventfd: on virtio-mmio a status bit comes first (4.2.2). */
#ifndef AV_RELAY_H
#define AV_RELAY_H

#include "home.h"
#include "interrupt.h"

/* cdef begin */
/* home, fd and interrupt are borrowed. fd: an eventfd; each time it is written the driver is told
 * of used buffers. NULL: *error is the errno. */
struct av_relay;
struct av_relay *av_relay_create(struct av_home *home, int fd, struct av_interrupt *interrupt,
                                 int *error);
void av_relay_destroy(struct av_relay *relay); /* its lane is at rest */
struct av_lane *av_relay_lane(struct av_relay *relay); /* no kicks */
/* cdef end */

#endif
