/* What a split ring has in flight, kept in memory that outlives this process.
 *
 * A back-end that dies has taken chains and not given them back, in whatever order it finished
 * others; the indices of the rings do not tell which. The front-end keeps a region for each ring,
 * in the layout of the vhost-user text (QueueRegionSplit), which its next back-end resumes from. */
#include <stdlib.h>
#include <string.h>

#include "vring_internal.h"

#define VERSION 1u

struct inflight_desc {
    uint8_t inflight;
    uint8_t padding[5];
    uint16_t next; /* in a batch that is being given back: the one given back before it */
    uint64_t counter; /* the order in which chains were taken */
};

struct av_inflight_region {
    uint64_t features;
    uint16_t version;
    uint16_t desc_num;
    uint16_t last_batch_head;
    uint16_t used_idx; /* of the used ring, when all fields were last in order */
    struct inflight_desc desc[];
};

_Static_assert(sizeof(struct inflight_desc) == 16, "DescStateSplit");
_Static_assert(sizeof(struct av_inflight_region) == 16, "QueueRegionSplit's head");

/* A chain that has to be taken again. */
struct again {
    uint64_t counter;
    uint16_t head;
};

uint32_t av_vring_inflight_bytes(uint32_t size)
{
    return (uint32_t)(sizeof(struct av_inflight_region) + size * sizeof(struct inflight_desc));
}

static int by_counter(const void *a, const void *b)
{
    const struct again *one = a, *other = b;

    return one->counter < other->counter ? -1 : one->counter > other->counter;
}

/* The last batch was shown to the driver, and then the process died: its chains are done. The
 * region is the front-end's, and may hold anything. */
static bool finish_batch(struct av_inflight_region *region, uint16_t size, uint16_t used_idx)
{
    uint16_t left = (uint16_t)(used_idx - region->used_idx), head = region->last_batch_head;

    if (left > size)
        return false;
    for (; left != 0; left--) {
        if (head >= size)
            return false;
        region->desc[head].inflight = 0;
        head = region->desc[head].next;
    }
    return true;
}

/* Forget whatever the region was for: another life of the ring. */
static void renew(struct av_inflight_region *region, uint16_t size)
{
    memset(region, 0, av_vring_inflight_bytes(size));
    region->version = VERSION;
    region->desc_num = size;
}

static void collect(struct av_inflight *inflight, uint16_t size)
{
    struct again found[AV_VRING_SIZE_MAX];
    uint16_t count = 0;

    for (uint16_t head = 0; head < size; head++)
        if (inflight->region->desc[head].inflight)
            found[count++] = (struct again){ inflight->region->desc[head].counter, head };
    qsort(found, count, sizeof(found[0]), by_counter);
    for (uint16_t i = 0; i < count; i++)
        inflight->again[i] = found[i].head;
    inflight->agains = count;
    inflight->counter = count != 0 ? found[count - 1].counter + 1 : 0;
}

void av_inflight_start(struct av_vring *ring, void *memory)
{
    struct av_inflight *inflight = &ring->inflight;
    struct av_inflight_region *region = memory;

    inflight->region = region;
    inflight->again_at = inflight->agains = inflight->batched = 0;
    inflight->counter = 0;
    if (region == NULL)
        return;
    if (region->version != VERSION || region->desc_num != ring->size ||
        !finish_batch(region, ring->size, ring->next_used))
        renew(region, ring->size);
    region->used_idx = ring->next_used;
    collect(inflight, ring->size);
    if (inflight->agains != 0)
        ring->next_avail = ring->split.avail_seen = (uint16_t)(ring->next_used + inflight->agains);
}

/* In these the order of the stores matters, for whoever reads them when this process is dead. */

void av_inflight_take(struct av_vring *ring, uint16_t head)
{
    struct inflight_desc *desc = &ring->inflight.region->desc[head];

    if (desc->inflight)
        return; /* taken again: it keeps its place, for one more process that may follow */
    desc->counter = ring->inflight.counter++;
    __atomic_store_n(&desc->inflight, 1, __ATOMIC_RELEASE);
}

void av_inflight_push(struct av_vring *ring, uint16_t head)
{
    struct av_inflight *inflight = &ring->inflight;

    /* More than the ring's size: the guest offered heads twice, and has itself to blame. */
    if (inflight->batched == AV_VRING_SIZE_MAX)
        return;
    inflight->batch[inflight->batched++] = head;
    inflight->region->desc[head].next = inflight->region->last_batch_head;
    __atomic_store_n(&inflight->region->last_batch_head, head, __ATOMIC_RELEASE);
}

void av_inflight_publish(struct av_vring *ring)
{
    struct av_inflight *inflight = &ring->inflight;

    for (uint16_t i = 0; i < inflight->batched; i++)
        __atomic_store_n(&inflight->region->desc[inflight->batch[i]].inflight, 0,
                         __ATOMIC_RELEASE);
    inflight->batched = 0;
    __atomic_store_n(&inflight->region->used_idx, ring->next_used, __ATOMIC_RELEASE);
}
