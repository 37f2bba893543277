/* Where a device's notifications to the driver go. */
#ifndef AV_INTERRUPT_H
#define AV_INTERRUPT_H

#include <stdint.h>

/* cdef begin */
/* Status bits that the driver has to acknowledge (virtio 1.3 sections 4.1.4.5 and 4.2.2) and the
 * eventfd behind the guest's interrupt. Any thread: rings raise it, vCPUs read and acknowledge it. */
struct av_interrupt;
struct av_interrupt *av_interrupt_create(int fd); /* fd is borrowed. NULL: errno */
void av_interrupt_destroy(struct av_interrupt *interrupt);
/* Where raises go from now on; -1: nowhere, and they set the status only. Whoever is raising may
 * write the old one once more, so it is closed only when nobody can be. */
void av_interrupt_set_fd(struct av_interrupt *interrupt, int fd);
void av_interrupt_raise(struct av_interrupt *interrupt, uint32_t bits); /* 1 used, 2 config */
uint32_t av_interrupt_status(const struct av_interrupt *interrupt);
void av_interrupt_ack(struct av_interrupt *interrupt, uint32_t bits);
uint64_t av_interrupt_count(const struct av_interrupt *interrupt);
/* cdef end */

#endif
