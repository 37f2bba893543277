#include <stdatomic.h>
#include <stdlib.h>

#include "vring_internal.h"

#define F_INDIRECT_DESC (1ull << 28)
#define F_EVENT_IDX (1ull << 29)
#define F_RING_PACKED (1ull << 34)
#define F_IN_ORDER (1ull << 35)

static const char *const fault_names[] = {
    [AV_FAULT_NONE] = "none",
    [AV_FAULT_BAD_GPA] = "bad-gpa",
    [AV_FAULT_BAD_HEAD] = "bad-head",
    [AV_FAULT_AVAIL_JUMP] = "avail-jump",
    [AV_FAULT_CHAIN_LOOP] = "chain-loop",
    [AV_FAULT_CHAIN_ORDER] = "chain-order",
    [AV_FAULT_INDIRECT_NESTED] = "indirect-nested",
    [AV_FAULT_INDIRECT_SIZE] = "indirect-size",
    [AV_FAULT_CHAIN_LONG] = "chain-long",
    [AV_FAULT_CHAIN_BYTES] = "chain-bytes",
    [AV_FAULT_ZERO_LENGTH] = "zero-length",
    [AV_FAULT_BAD_ID] = "bad-id",
    [AV_FAULT_CHAIN_CUT] = "chain-cut",
    [AV_FAULT_REQUEST] = "request",
};

const char *av_fault_name(int fault)
{
    if (fault < 0 || (size_t)fault >= sizeof(fault_names) / sizeof(fault_names[0]))
        return "unknown";
    return fault_names[fault];
}

struct av_vring *av_vring_create(const struct av_gmem *mem, struct av_interrupt *interrupt)
{
    struct av_vring *ring = calloc(1, sizeof(*ring));
    if (ring != NULL) {
        ring->mem = mem;
        ring->interrupt = interrupt;
    }
    return ring;
}

void av_vring_destroy(struct av_vring *ring)
{
    free(ring);
}

int av_vring_start(struct av_vring *ring, const struct av_vring_setup *setup)
{
    int result;

    if (setup->size == 0 || setup->size > AV_VRING_SIZE_MAX)
        return -EINVAL;
    ring->size = (uint16_t)setup->size;
    ring->near = &ring->mem->region[0];
    ring->is_packed = (setup->features & F_RING_PACKED) != 0;
    ring->event_idx = (setup->features & F_EVENT_IDX) != 0;
    ring->indirect = (setup->features & F_INDIRECT_DESC) != 0;
    ring->in_order = (setup->features & F_IN_ORDER) != 0;
    ring->last_whole = false;
    ring->shown = 0;
    ring->fault = AV_FAULT_NONE;
    result = ring->is_packed ? av_vring_packed_start(ring, setup)
                             : av_vring_split_start(ring, setup);
    ring->running = result == 0;
    if (result == 0)
        av_inflight_start(ring, ring->is_packed || !setup->resume ? NULL : setup->inflight);
    return result;
}

void av_vring_stop(struct av_vring *ring)
{
    ring->running = false;
}

uint32_t av_vring_base(const struct av_vring *ring)
{
    return ring->is_packed ? av_vring_packed_base(ring) : av_vring_split_base(ring);
}

void av_vring_statistics(const struct av_vring *ring, struct av_vring_stats *out)
{
    const struct av_vring_stats *stats = &ring->stats;

    *out = (struct av_vring_stats){
        .kicks = av_counted(&stats->kicks),
        .chains = av_counted(&stats->chains),
        .used = av_counted(&stats->used),
        .interrupts = av_counted(&stats->interrupts),
        .suppressed = av_counted(&stats->suppressed),
        .fault = av_vring_fault(ring),
        .size = ring->size,
        .next_avail = av_load16(&ring->next_avail),
        .next_used = av_load16(&ring->next_used),
        .running = ring->running,
        .packed = ring->is_packed,
        .event_idx = ring->event_idx,
        .in_order = ring->in_order,
    };
}

int av_vring_fault(const struct av_vring *ring)
{
    return __atomic_load_n(&ring->fault, __ATOMIC_RELAXED);
}

uint64_t av_vring_taken(const struct av_vring *ring)
{
    return av_counted(&ring->stats.chains);
}

void av_vring_fail(struct av_vring *ring, int fault)
{
    av_vring_break(ring, fault);
}

void av_vring_count_kick(struct av_vring *ring)
{
    av_count(&ring->stats.kicks, 1);
}

int av_vring_pop(struct av_vring *ring, struct av_chain *out, struct iovec *iov, uint32_t iov_max)
{
    int result;

    if (!ring->running)
        return 0;
    if (ring->fault != AV_FAULT_NONE)
        return -EPROTO;
    result = ring->is_packed ? av_vring_packed_pop(ring, out, iov, iov_max)
                             : av_vring_split_pop(ring, out, iov, iov_max);
    if (result > 0)
        av_count(&ring->stats.chains, 1);
    if (result > 0 && ring->inflight.region != NULL)
        av_inflight_take(ring, out->head);
    return result;
}

void av_vring_unpop(struct av_vring *ring)
{
    if (ring->is_packed)
        av_vring_packed_unpop(ring);
    else
        av_vring_split_unpop(ring);
    av_count(&ring->stats.chains, UINT64_MAX); /* one less */
}

void av_vring_push(struct av_vring *ring, uint16_t head, uint32_t written_bytes)
{
    if (!ring->running)
        return;
    if (ring->inflight.region != NULL)
        av_inflight_push(ring, head);
    if (ring->is_packed)
        av_vring_packed_push(ring, head, written_bytes);
    else
        av_vring_split_push(ring, head, written_bytes);
    av_count(&ring->stats.used, 1);
}

void av_vring_show(struct av_vring *ring)
{
    if (!ring->running)
        return;
    ring->last_whole = false;
    ring->shown +=
        ring->is_packed ? av_vring_packed_publish(ring) : av_vring_split_publish(ring);
    if (ring->inflight.region != NULL)
        av_inflight_publish(ring);
}

static bool wants_interrupt(const struct av_vring *ring, uint16_t count)
{
    return ring->is_packed ? av_vring_packed_wants_interrupt(ring, count)
                           : av_vring_split_wants_interrupt(ring, count);
}

int av_vring_interrupt_due(const struct av_vring *ring)
{
    return ring->running && ring->shown != 0 && wants_interrupt(ring, ring->shown);
}

void av_vring_flush(struct av_vring *ring)
{
    uint16_t shown;

    av_vring_show(ring);
    shown = ring->shown;
    ring->shown = 0;
    if (!ring->running || shown == 0)
        return;
    /* Full: our store of idx, or of a used descriptor's flags, against our load of used_event, or
     * of the driver's event suppression. It pairs with the driver's full barrier between its store
     * of that and its last look at the ring. Without it each could miss the other's store, and the
     * driver would sleep with work in the ring. */
    atomic_thread_fence(memory_order_seq_cst);
    if (wants_interrupt(ring, shown)) {
        av_count(&ring->stats.interrupts, 1);
        av_interrupt_raise(ring->interrupt, 1);
    } else {
        av_count(&ring->stats.suppressed, 1);
    }
}

static void set_kicks(struct av_vring *ring, bool on)
{
    if (ring->is_packed)
        av_vring_packed_kicks(ring, on);
    else
        av_vring_split_kicks(ring, on);
}

void av_vring_kicks_off(struct av_vring *ring)
{
    if (ring->running)
        set_kicks(ring, false);
}

int av_vring_pending(const struct av_vring *ring)
{
    if (!ring->running || ring->fault != AV_FAULT_NONE)
        return 0;
    return ring->is_packed ? av_vring_packed_pending(ring) : av_vring_split_pending(ring);
}

int av_vring_kicks_on(struct av_vring *ring)
{
    if (!ring->running || ring->fault != AV_FAULT_NONE)
        return 0;
    set_kicks(ring, true);
    /* Full: our store against the load of avail->idx, or of a descriptor's flags, below. It pairs
     * with the driver's full barrier between its store of that and its look at avail_event, flags
     * or our event suppression. Without it the driver could skip the kick while we miss its
     * chain. */
    atomic_thread_fence(memory_order_seq_cst);
    return av_vring_pending(ring);
}
