/* The split layout: descriptor table, available ring, used ring (virtio 1.3 section 2.7). */
#include "vring_chain.h"

#define AVAIL_NO_INTERRUPT 1u
#define USED_NO_NOTIFY 1u

static uint16_t *avail_event(struct av_vring *ring)
{
    return (uint16_t *)&ring->split.used->ring[ring->size];
}

int av_vring_split_start(struct av_vring *ring, const struct av_vring_setup *setup)
{
    uint32_t size = setup->size;
    void *desc, *avail, *used;

    if ((size & (size - 1)) != 0)
        return -EINVAL;
    if (setup->desc_gpa % 16 != 0 || setup->driver_gpa % 2 != 0 || setup->device_gpa % 4 != 0)
        return -EINVAL;
    if (setup->resume && setup->base > UINT16_MAX)
        return -EINVAL;
    desc = av_gmem_hva(ring->mem, setup->desc_gpa, sizeof(struct av_desc) * size);
    avail = av_gmem_hva(ring->mem, setup->driver_gpa, sizeof(struct av_avail) + 2u * size + 2);
    used = av_gmem_hva(ring->mem, setup->device_gpa,
                       sizeof(struct av_used) + sizeof(struct av_used_elem) * size + 2);
    if (desc == NULL || avail == NULL || used == NULL)
        return -EFAULT;
    ring->split = (struct av_split){ .desc = desc, .avail = avail, .used = used };
    ring->next_avail = setup->resume ? (uint16_t)setup->base : 0;
    ring->next_used = setup->resume ? av_load16(&ring->split.used->idx) : 0;
    ring->split.avail_seen = ring->next_avail;
    ring->split.published = ring->next_used;
    return 0;
}

uint32_t av_vring_split_base(const struct av_vring *ring)
{
    return ring->next_avail;
}

/* Whether the driver has made a chain available that we have not taken; -EPROTO. */
static int available(struct av_vring *ring)
{
    struct av_split *split = &ring->split;

    if (ring->next_avail != split->avail_seen)
        return 1;
    /* Acquire: pairs with the driver's write barrier between filling the ring and moving idx.
     * Without it we could read entries older than the index that announces them. */
    split->avail_seen = __atomic_load_n(&split->avail->idx, __ATOMIC_ACQUIRE);
    if ((uint16_t)(split->avail_seen - ring->next_avail) > ring->size)
        return av_vring_break(ring, AV_FAULT_AVAIL_JUMP);
    return ring->next_avail != split->avail_seen;
}

static uint16_t head_at(const struct av_vring *ring, uint16_t index)
{
    return av_load16(&ring->split.avail->ring[index & (ring->size - 1)]);
}

/* Follow the chain from `head`; 0 or a fault. */
static int follow(struct av_vring *ring, uint16_t head, struct av_walk *walk)
{
    const void *table = ring->split.desc;
    uint32_t entries = ring->size, left = ring->size, at = head;
    bool in_table = false; /* not told by where it is: that may be within the ring */

    for (;;) {
        struct av_desc desc;
        uint16_t flags;
        int fault;

        if (at >= entries)
            return AV_FAULT_BAD_HEAD;
        if (left-- == 0)
            return AV_FAULT_CHAIN_LOOP;
        desc = av_desc_copy(table, at);
        flags = (uint16_t)(desc.rest >> 32);
        if (flags & AV_DESC_INDIRECT) {
            if (!ring->indirect || in_table || (flags & AV_DESC_NEXT))
                return AV_FAULT_INDIRECT_NESTED;
            fault = av_walk_table(ring, &desc, &table, &entries);
            if (fault != AV_FAULT_NONE)
                return fault;
            in_table = true;
            left = entries;
            at = 0;
            continue;
        }
        fault = av_walk_add(ring, walk, &desc, (flags & AV_DESC_WRITE) != 0);
        if (fault != AV_FAULT_NONE || !(flags & AV_DESC_NEXT))
            return fault;
        at = (uint16_t)(desc.rest >> 48);
    }
}

int av_vring_split_pop(struct av_vring *ring, struct av_chain *out, struct iovec *iov,
                       uint32_t iov_max)
{
    struct av_walk walk = { .out = out, .iov_max = iov_max };
    bool again = ring->inflight.again_at != ring->inflight.agains;
    int result = again ? 1 : available(ring), fault;

    if (result <= 0)
        return result;
    *out = (struct av_chain){
        .head = again ? ring->inflight.again[ring->inflight.again_at]
                      : head_at(ring, ring->next_avail),
        .iov = iov,
    };
    fault = follow(ring, out->head, &walk);
    if (fault != AV_FAULT_NONE)
        return av_vring_break(ring, fault);
    if (ring->in_order)
        ring->taken[out->head].writable_bytes = out->writable_bytes;
    if (again)
        ring->inflight.again_at++;
    else
        av_store16(&ring->next_avail, (uint16_t)(ring->next_avail + 1));
    return 1;
}

void av_vring_split_unpop(struct av_vring *ring)
{
    av_store16(&ring->next_avail, (uint16_t)(ring->next_avail - 1));
}

void av_vring_split_push(struct av_vring *ring, uint16_t head, uint32_t written_bytes)
{
    struct av_used_elem *elem;

    /* Section 2.7.9: one element, where the batch's first would be, may speak for a batch by the
     * head of its last; but for those before the last only that they were written wholly. */
    if (!ring->in_order || !ring->last_whole)
        ring->split.last = ring->next_used;
    elem = &ring->split.used->ring[ring->split.last & (ring->size - 1)];
    __atomic_store_n(&elem->id, head, __ATOMIC_RELAXED);
    __atomic_store_n(&elem->len, written_bytes, __ATOMIC_RELAXED);
    if (ring->in_order)
        ring->last_whole = written_bytes == ring->taken[head].writable_bytes;
    av_store16(&ring->next_used, (uint16_t)(ring->next_used + 1));
}

uint16_t av_vring_split_publish(struct av_vring *ring)
{
    uint16_t count = (uint16_t)(ring->next_used - ring->split.published);

    if (count != 0) {
        /* Release: pairs with the driver's read barrier after it reads idx. Without it the driver
         * could see the index before the elements, and data, that it announces. */
        __atomic_store_n(&ring->split.used->idx, ring->next_used, __ATOMIC_RELEASE);
        ring->split.published = ring->next_used;
    }
    return count;
}

bool av_vring_split_wants_interrupt(const struct av_vring *ring, uint16_t published)
{
    const struct av_avail *avail = ring->split.avail;
    uint16_t event;

    if (!ring->event_idx)
        return !(av_load16(&avail->flags) & AVAIL_NO_INTERRUPT);
    /* Section 2.7.7.2: used_event names the element after which it wants one; all modulo 2^16. */
    event = av_load16(&avail->ring[ring->size]);
    return (uint16_t)(ring->next_used - event - 1) < published;
}

void av_vring_split_kicks(struct av_vring *ring, bool on)
{
    if (!ring->event_idx)
        av_store16(&ring->split.used->flags, on ? 0 : USED_NO_NOTIFY);
    else if (on)
        av_store16(avail_event(ring), ring->next_avail);
    /* To have none, avail_event stays where it is: the driver passed it with its last kick and
     * does not kick again before it is moved, or before 2^16 more chains. */
}

bool av_vring_split_pending(const struct av_vring *ring)
{
    return ring->inflight.again_at != ring->inflight.agains ||
           av_load16(&ring->split.avail->idx) != ring->next_avail;
}
