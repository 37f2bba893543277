/* The virtqueue, driver side (virtio 1.3 sections 2.7 and 2.8): what measures and tests devices. */
#ifndef AV_VDRIVER_H
#define AV_VDRIVER_H

#include <stdint.h>

#include "gmem.h"

#define AV_VDRIVER_SEGMENTS_MAX 8

/* cdef begin */
/* mem: shared with the device. table_gpa: room for 128 bytes of indirect table a descriptor, used
 * where INDIRECT_DESC is among the features. kick_fd, call_fd: eventfds, borrowed; each may be -1
 * where nobody waits on the other side. */
struct av_vdriver_setup {
    const struct av_gmem *mem;
    uint64_t desc_gpa;
    uint64_t driver_gpa;
    uint64_t device_gpa;
    uint64_t table_gpa;
    uint64_t features;
    uint32_t size;
    int kick_fd;
    int call_fd;
};

struct av_vdriver_segment {
    uint64_t gpa;
    uint32_t size_bytes;
};

struct av_vdriver_stats {
    uint64_t added;
    uint64_t taken;
    uint64_t kicks;
    uint64_t kicks_suppressed; /* batches the device did not want to hear of */
    uint64_t interrupts;
};

/* One thread uses a driver. */
struct av_vdriver;
/* NULL, and *error -EINVAL or -EFAULT, as av_vring_start() of the same ring; or -ENOMEM. */
struct av_vdriver *av_vdriver_create(const struct av_vdriver_setup *setup, int *error);
void av_vdriver_destroy(struct av_vdriver *driver);
/* Add a chain: `readable` segments for the device to read, then `writable` ones to write. The
 * device does not see it before av_vdriver_publish(). token: comes back with it. 1, 0 no room. */
int av_vdriver_add(struct av_vdriver *driver, const struct av_vdriver_segment *segments,
                   uint32_t readable, uint32_t writable, uint32_t token);
/* Show all added chains to the device, and kick it once if it asks for that. 1 when kicked. */
int av_vdriver_publish(struct av_vdriver *driver);
/* Take a chain that came back. 1, 0 none, -EPROTO the device broke the ring. */
int av_vdriver_take(struct av_vdriver *driver, uint32_t *token, uint32_t *written_bytes);
/* Ask not to be interrupted, for as long as the ring is watched anyway. */
void av_vdriver_interrupts_off(struct av_vdriver *driver);
/* Ask to be interrupted by the next chain; 1 when one came meanwhile: take it first. */
int av_vdriver_interrupts_on(struct av_vdriver *driver);
/* Sleep until the device interrupts, or somebody else writes to call_fd. 0 or -errno. */
int av_vdriver_wait(struct av_vdriver *driver);
void av_vdriver_statistics(const struct av_vdriver *driver, struct av_vdriver_stats *out);
/* cdef end */

#endif
