/* The checks of descriptors, the same for both layouts: from what the driver wrote to iovecs. */
#ifndef AV_VRING_CHAIN_H
#define AV_VRING_CHAIN_H

#include "vring_internal.h"

/* A walk through one chain, filling `out`. */
struct av_walk {
    struct av_chain *out;
    uint32_t iov_max;
    uint64_t bytes;
};

static inline uint32_t av_desc_len(const struct av_desc *desc)
{
    return (uint32_t)desc->rest;
}

/* A word of memory that need not be aligned: an indirect table may be anywhere. */
typedef uint64_t av_word __attribute__((aligned(1), may_alias));

/* An entry of a ring or table as it was at one moment: the guest may change it while we look, so
 * it is read once, which volatile makes sure of. */
static inline struct av_desc av_desc_copy(const void *table, uint32_t index)
{
    const uint8_t *from = (const uint8_t *)table + sizeof(struct av_desc) * index;
    const volatile av_word *word = (const volatile av_word *)from;

    return (struct av_desc){ .gpa = word[0], .rest = word[1] };
}

/* Add a descriptor's memory to the chain; 0 or a fault. */
static inline int av_walk_add(struct av_vring *ring, struct av_walk *walk,
                              const struct av_desc *desc, bool writable)
{
    struct av_chain *out = walk->out;
    uint32_t count = (uint32_t)out->readable + out->writable, len = av_desc_len(desc);
    uint8_t *hva;

    if (len == 0)
        return AV_FAULT_ZERO_LENGTH;
    if (!writable && out->writable != 0)
        return AV_FAULT_CHAIN_ORDER;
    if (count == walk->iov_max)
        return AV_FAULT_CHAIN_LONG;
    walk->bytes += len;
    if (walk->bytes > UINT32_MAX)
        return AV_FAULT_CHAIN_BYTES;
    hva = av_gmem_hva_near(ring->mem, &ring->near, desc->gpa, len);
    if (hva == NULL)
        return AV_FAULT_BAD_GPA;
    out->iov[count] = (struct iovec){ .iov_base = hva, .iov_len = len };
    if (writable) {
        out->writable++;
        out->writable_bytes += len;
    } else {
        out->readable++;
        out->readable_bytes += len;
    }
    return AV_FAULT_NONE;
}

/* The table an indirect descriptor names, and how many entries it has; 0 or a fault. */
static inline int av_walk_table(struct av_vring *ring, const struct av_desc *desc,
                                const void **table, uint32_t *entries)
{
    uint32_t len = av_desc_len(desc);

    if (len == 0 || len % sizeof(struct av_desc) != 0 ||
        len / sizeof(struct av_desc) > AV_VRING_SIZE_MAX)
        return AV_FAULT_INDIRECT_SIZE;
    *table = av_gmem_hva_near(ring->mem, &ring->near, desc->gpa, len);
    *entries = len / (uint32_t)sizeof(struct av_desc);
    return *table == NULL ? AV_FAULT_BAD_GPA : AV_FAULT_NONE;
}

#endif
