/* The virtqueue, device side: split or packed (virtio 1.3 sections 2.7 and 2.8). */
#ifndef AV_VRING_H
#define AV_VRING_H

#include <stdint.h>
#include <sys/uio.h>

#include "gmem.h"
#include "interrupt.h"

/* cdef begin */
enum av_fault {
    AV_FAULT_NONE,
    AV_FAULT_BAD_GPA,
    AV_FAULT_BAD_HEAD,
    AV_FAULT_AVAIL_JUMP,
    AV_FAULT_CHAIN_LOOP,
    AV_FAULT_CHAIN_ORDER,
    AV_FAULT_INDIRECT_NESTED,
    AV_FAULT_INDIRECT_SIZE,
    AV_FAULT_CHAIN_LONG,
    AV_FAULT_CHAIN_BYTES,
    AV_FAULT_ZERO_LENGTH,
    AV_FAULT_BAD_ID,
    AV_FAULT_CHAIN_CUT,
    AV_FAULT_REQUEST
};
const char *av_fault_name(int fault);

struct av_vring_stats {
    uint64_t kicks;
    uint64_t chains;
    uint64_t used;
    uint64_t interrupts;
    uint64_t suppressed;
    int32_t fault;
    uint32_t size;
    uint16_t next_avail;
    uint16_t next_used;
    uint8_t running;
    uint8_t packed;
    uint8_t event_idx;
    uint8_t in_order;
};

/* Where the driver put a ring (virtio 1.3 section 2.6), what was negotiated, where to begin.
 * resume: go on at `base` as vhost-user's GET_VRING_BASE gives it, not in an empty ring. For a
 * split ring that is the available index, and the used index is read from memory; for a packed one
 * the offset and, in bit 15, the wrap counter of the next chain to take, and in the upper half of
 * the next used descriptor.
 * inflight: where a split ring that is resumed keeps what is in flight. What another process left
 * there is taken first, whatever `base` says. */
struct av_vring_setup {
    uint64_t desc_gpa;
    uint64_t driver_gpa;
    uint64_t device_gpa;
    uint64_t features;
    uint32_t size;
    uint32_t base;
    uint8_t resume;
    uint8_t *inflight; /* av_vring_inflight_bytes() that outlive this process, or NULL */
};

struct av_vring;
struct av_vring *av_vring_create(const struct av_gmem *mem, struct av_interrupt *interrupt);
void av_vring_destroy(struct av_vring *ring);
uint32_t av_vring_inflight_bytes(uint32_t size);
/* Begin; 0, -EINVAL for a bad size, alignment or base, -EFAULT outside of memory. */
int av_vring_start(struct av_vring *ring, const struct av_vring_setup *setup);
/* Let go of the driver's memory. Chains taken and not used are forgotten: see av_vring_unpop(). */
void av_vring_stop(struct av_vring *ring);
/* Where the ring stands, also after av_vring_stop(): what a later start can resume from. */
uint32_t av_vring_base(const struct av_vring *ring);
void av_vring_statistics(const struct av_vring *ring, struct av_vring_stats *out);
int av_vring_fault(const struct av_vring *ring);

/* One descriptor chain, by the index of its head or, in a packed ring, by its buffer id:
 * `readable` segments of the driver's data, then `writable` ones of room, all checked addresses in
 * guest memory. */
struct av_chain {
    uint16_t head;
    uint16_t readable;
    uint16_t writable;
    uint32_t readable_bytes;
    uint32_t writable_bytes;
    struct iovec *iov;
};

/* Take the next chain into iov[0..iov_max). 1 taken, 0 none, -EPROTO the guest broke the ring. */
int av_vring_pop(struct av_vring *ring, struct av_chain *out, struct iovec *iov, uint32_t iov_max);
/* Not for a ring that keeps what is in flight.
 * Give back the chain popped last; called again, the one before it, and so on. */
void av_vring_unpop(struct av_vring *ring);
/* Fill the next used element; the driver does not see it before av_vring_flush(). A device that
 * offers IN_ORDER gives chains back as it took them, and of each what it says is written is
 * written from the front. */
void av_vring_push(struct av_vring *ring, uint16_t head, uint32_t written_bytes);
/* Show all pushed elements to a driver that looks; av_vring_flush() follows soon, before another
 * 2^15 descriptors. */
void av_vring_show(struct av_vring *ring);
/* Show all pushed elements to the driver and interrupt it at most once, if it wants that. */
void av_vring_flush(struct av_vring *ring);
/* Whether it wants an interrupt for what it was shown since the last flush. */
int av_vring_interrupt_due(const struct av_vring *ring);
/* Ask the driver not to kick, for as long as the ring is being emptied anyway. */
void av_vring_kicks_off(struct av_vring *ring);
/* Ask for kicks again; 1 when chains came meanwhile, and then the caller has to look again. */
int av_vring_kicks_on(struct av_vring *ring);
/* Whether a chain is waiting, without taking it: a look at memory only. */
int av_vring_pending(const struct av_vring *ring);
/* A fault found by the device in a chain's contents: the ring is dead until it is restarted. */
void av_vring_fail(struct av_vring *ring, int fault);
/* A kick came. */
void av_vring_count_kick(struct av_vring *ring);
/* cdef end */
/* How many chains were taken and not given back by av_vring_unpop(), ever. */
uint64_t av_vring_taken(const struct av_vring *ring);

/* Entries of a ring, or of an indirect table, at most. */
#define AV_VRING_SIZE_MAX 1024u

#endif
