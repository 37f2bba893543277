#include "vring.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SIZE_MAX_ENTRIES 1024u
#define F_INDIRECT_DESC (1ull << 28)
#define F_EVENT_IDX (1ull << 29)

#define DESC_NEXT 1u
#define DESC_WRITE 2u
#define DESC_INDIRECT 4u
#define AVAIL_NO_INTERRUPT 1u
#define USED_NO_NOTIFY 1u

/* The layouts of virtio 1.3 sections 2.7.5, 2.7.6 and 2.7.8, little-endian as the host is. */
struct desc {
    uint64_t gpa;
    uint32_t len;
    uint16_t flags;
    uint16_t next;
};

struct avail {
    uint16_t flags;
    uint16_t idx;
    uint16_t ring[]; /* then used_event */
};

struct used_elem {
    uint32_t id;
    uint32_t len;
};

struct used {
    uint16_t flags;
    uint16_t idx;
    struct used_elem ring[]; /* then avail_event */
};

_Static_assert(sizeof(struct desc) == 16, "descriptor");
_Static_assert(sizeof(struct avail) == 4, "available ring head");
_Static_assert(sizeof(struct used_elem) == 8, "used element");
_Static_assert(sizeof(struct used) == 4, "used ring head");

struct av_vring {
    const struct av_gmem *mem;
    struct av_interrupt *interrupt;
    const struct desc *desc;
    struct avail *avail;
    struct used *used;
    uint16_t size;
    uint16_t next_avail; /* next available entry to take */
    uint16_t avail_seen; /* avail->idx as last read and checked */
    uint16_t next_used;  /* next used element to fill */
    uint16_t published;  /* used->idx as the driver sees it */
    bool running;
    bool event_idx;
    bool indirect;
    int fault;
    struct av_vring_stats stats;
};

/* A walk through one chain. */
struct walk {
    const struct desc *table;
    uint32_t entries;
    uint32_t left; /* descriptors that may still come: what bounds a loop */
    uint64_t bytes;
};

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
    [AV_FAULT_REQUEST] = "request",
};

const char *av_fault_name(int fault)
{
    if (fault < 0 || (size_t)fault >= sizeof(fault_names) / sizeof(fault_names[0]))
        return "unknown";
    return fault_names[fault];
}

static uint16_t load16(const uint16_t *at)
{
    return __atomic_load_n(at, __ATOMIC_RELAXED);
}

static void store16(uint16_t *at, uint16_t value)
{
    __atomic_store_n(at, value, __ATOMIC_RELAXED);
}

static uint16_t *used_event(struct av_vring *ring)
{
    return &ring->avail->ring[ring->size];
}

static uint16_t *avail_event(struct av_vring *ring)
{
    return (uint16_t *)&ring->used->ring[ring->size];
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
    uint32_t size = setup->size;
    void *desc, *avail, *used;

    if (size == 0 || size > SIZE_MAX_ENTRIES || (size & (size - 1)) != 0)
        return -EINVAL;
    if (setup->desc_gpa % 16 != 0 || setup->driver_gpa % 2 != 0 || setup->device_gpa % 4 != 0)
        return -EINVAL;
    if (setup->resume && setup->base > UINT16_MAX)
        return -EINVAL;
    desc = av_gmem_hva(ring->mem, setup->desc_gpa, sizeof(struct desc) * size);
    avail = av_gmem_hva(ring->mem, setup->driver_gpa, sizeof(struct avail) + 2u * size + 2);
    used = av_gmem_hva(ring->mem, setup->device_gpa,
                       sizeof(struct used) + sizeof(struct used_elem) * size + 2);
    if (desc == NULL || avail == NULL || used == NULL)
        return -EFAULT;
    ring->desc = desc;
    ring->avail = avail;
    ring->used = used;
    ring->size = (uint16_t)size;
    ring->next_avail = ring->avail_seen = setup->resume ? (uint16_t)setup->base : 0;
    ring->next_used = ring->published = setup->resume ? load16(&ring->used->idx) : 0;
    ring->event_idx = (setup->features & F_EVENT_IDX) != 0;
    ring->indirect = (setup->features & F_INDIRECT_DESC) != 0;
    ring->fault = AV_FAULT_NONE;
    ring->running = true;
    return 0;
}

void av_vring_stop(struct av_vring *ring)
{
    ring->running = false;
    ring->desc = NULL;
    ring->avail = NULL;
    ring->used = NULL;
}

uint32_t av_vring_base(const struct av_vring *ring)
{
    return ring->next_avail;
}

void av_vring_statistics(const struct av_vring *ring, struct av_vring_stats *out)
{
    *out = ring->stats;
    out->fault = ring->fault;
    out->size = ring->size;
    out->next_avail = ring->next_avail;
    out->next_used = ring->next_used;
    out->running = ring->running;
    out->event_idx = ring->event_idx;
}

int av_vring_fault(const struct av_vring *ring)
{
    return ring->fault;
}

void av_vring_fail(struct av_vring *ring, int fault)
{
    ring->fault = fault;
}

static int fail(struct av_vring *ring, int fault)
{
    ring->fault = fault;
    return -EPROTO;
}

void av_vring_take_kick(struct av_vring *ring, int kick_fd)
{
    uint64_t kicks;

    if (kick_fd >= 0 && read(kick_fd, &kicks, sizeof(kicks)) == sizeof(kicks))
        ring->stats.kicks += kicks;
}

void av_vring_count_kick(struct av_vring *ring)
{
    ring->stats.kicks++;
}

/* Chains the driver has made available and we have not taken; -EPROTO. */
static int available(struct av_vring *ring)
{
    if (ring->next_avail != ring->avail_seen)
        return 1;
    /* Acquire: pairs with the driver's write barrier between filling the ring and moving idx.
     * Without it we could read entries older than the index that announces them. */
    ring->avail_seen = __atomic_load_n(&ring->avail->idx, __ATOMIC_ACQUIRE);
    if ((uint16_t)(ring->avail_seen - ring->next_avail) > ring->size)
        return fail(ring, AV_FAULT_AVAIL_JUMP);
    return ring->next_avail != ring->avail_seen;
}

/* A descriptor as it was at one moment: the guest may change it while we look. */
static struct desc copy_desc(const struct desc *from)
{
    struct desc copy;

    copy.gpa = __atomic_load_n(&from->gpa, __ATOMIC_RELAXED);
    copy.len = __atomic_load_n(&from->len, __ATOMIC_RELAXED);
    copy.flags = __atomic_load_n(&from->flags, __ATOMIC_RELAXED);
    copy.next = __atomic_load_n(&from->next, __ATOMIC_RELAXED);
    return copy;
}

/* Add a descriptor's memory to the chain; 0 or a fault. */
static int add_segment(struct av_vring *ring, struct walk *walk, const struct desc *desc,
                       struct av_chain *out, uint32_t iov_max)
{
    uint32_t count = (uint32_t)out->readable + out->writable;
    uint8_t *hva;

    if (desc->len == 0)
        return AV_FAULT_ZERO_LENGTH;
    if (!(desc->flags & DESC_WRITE) && out->writable != 0)
        return AV_FAULT_CHAIN_ORDER;
    if (count == iov_max)
        return AV_FAULT_CHAIN_LONG;
    walk->bytes += desc->len;
    if (walk->bytes > UINT32_MAX)
        return AV_FAULT_CHAIN_BYTES;
    hva = av_gmem_hva(ring->mem, desc->gpa, desc->len);
    if (hva == NULL)
        return AV_FAULT_BAD_GPA;
    out->iov[count] = (struct iovec){ .iov_base = hva, .iov_len = desc->len };
    if (desc->flags & DESC_WRITE) {
        out->writable++;
        out->writable_bytes += desc->len;
    } else {
        out->readable++;
        out->readable_bytes += desc->len;
    }
    return AV_FAULT_NONE;
}

/* Go over to the table an indirect descriptor names; 0 or a fault. */
static int enter_indirect(struct av_vring *ring, struct walk *walk, const struct desc *desc)
{
    if (!ring->indirect || walk->table != ring->desc || (desc->flags & DESC_NEXT))
        return AV_FAULT_INDIRECT_NESTED;
    if (desc->len == 0 || desc->len % sizeof(struct desc) != 0 ||
        desc->len / sizeof(struct desc) > SIZE_MAX_ENTRIES)
        return AV_FAULT_INDIRECT_SIZE;
    walk->table = (const struct desc *)av_gmem_hva(ring->mem, desc->gpa, desc->len);
    if (walk->table == NULL)
        return AV_FAULT_BAD_GPA;
    walk->entries = walk->left = desc->len / (uint32_t)sizeof(struct desc);
    return AV_FAULT_NONE;
}

/* Follow the chain from `head`; 0 or a fault. */
static int follow(struct av_vring *ring, uint16_t head, struct av_chain *out, uint32_t iov_max)
{
    struct walk walk = { .table = ring->desc, .entries = ring->size, .left = ring->size };
    uint32_t at = head;

    for (;;) {
        struct desc desc;
        int fault;

        if (at >= walk.entries)
            return AV_FAULT_BAD_HEAD;
        if (walk.left-- == 0)
            return AV_FAULT_CHAIN_LOOP;
        desc = copy_desc(&walk.table[at]);
        if (desc.flags & DESC_INDIRECT) {
            fault = enter_indirect(ring, &walk, &desc);
            if (fault != AV_FAULT_NONE)
                return fault;
            at = 0;
            continue;
        }
        fault = add_segment(ring, &walk, &desc, out, iov_max);
        if (fault != AV_FAULT_NONE || !(desc.flags & DESC_NEXT))
            return fault;
        at = desc.next;
    }
}

int av_vring_pop(struct av_vring *ring, struct av_chain *out, struct iovec *iov, uint32_t iov_max)
{
    int result, fault;

    if (!ring->running)
        return 0;
    if (ring->fault != AV_FAULT_NONE)
        return -EPROTO;
    result = available(ring);
    if (result <= 0)
        return result;
    *out = (struct av_chain){ .iov = iov };
    out->head = load16(&ring->avail->ring[ring->next_avail & (ring->size - 1)]);
    fault = follow(ring, out->head, out, iov_max);
    if (fault != AV_FAULT_NONE)
        return fail(ring, fault);
    ring->next_avail++;
    ring->stats.chains++;
    return 1;
}

void av_vring_unpop(struct av_vring *ring)
{
    ring->next_avail--;
    ring->stats.chains--;
}

void av_vring_push(struct av_vring *ring, uint16_t head, uint32_t written_bytes)
{
    struct used_elem *elem;

    if (!ring->running)
        return;
    elem = &ring->used->ring[ring->next_used++ & (ring->size - 1)];
    __atomic_store_n(&elem->id, head, __ATOMIC_RELAXED);
    __atomic_store_n(&elem->len, written_bytes, __ATOMIC_RELAXED);
    ring->stats.used++;
}

/* Whether the driver asked to be interrupted for one of the elements from `old` on. */
static bool wants_interrupt(struct av_vring *ring, uint16_t old)
{
    uint16_t event;

    if (!ring->event_idx)
        return !(load16(&ring->avail->flags) & AVAIL_NO_INTERRUPT);
    /* Section 2.7.7.2: used_event names the element after which it wants one; all modulo 2^16. */
    event = load16(used_event(ring));
    return (uint16_t)(ring->next_used - event - 1) < (uint16_t)(ring->next_used - old);
}

void av_vring_flush(struct av_vring *ring)
{
    uint16_t old = ring->published;

    if (!ring->running || old == ring->next_used)
        return;
    /* Release: pairs with the driver's read barrier after it reads idx. Without it the driver
     * could see the index before the elements, and data, that it announces. */
    __atomic_store_n(&ring->used->idx, ring->next_used, __ATOMIC_RELEASE);
    ring->published = ring->next_used;
    /* Full: our store of idx against our load of used_event. It pairs with the driver's store of
     * used_event before it looks at idx once more. Without it each could miss the other's store,
     * and the driver would sleep with work in the ring. */
    atomic_thread_fence(memory_order_seq_cst);
    if (wants_interrupt(ring, old)) {
        ring->stats.interrupts++;
        av_interrupt_raise(ring->interrupt, 1);
    } else {
        ring->stats.suppressed++;
    }
}

void av_vring_kicks_off(struct av_vring *ring)
{
    /* With EVENT_IDX, avail_event stays where it is: the driver passed it with its last kick and
     * does not kick again before it is moved. */
    if (ring->running && !ring->event_idx)
        store16(&ring->used->flags, USED_NO_NOTIFY);
}

int av_vring_pending(const struct av_vring *ring)
{
    if (!ring->running || ring->fault != AV_FAULT_NONE)
        return 0;
    return load16(&ring->avail->idx) != ring->next_avail;
}

int av_vring_kicks_on(struct av_vring *ring)
{
    if (!ring->running || ring->fault != AV_FAULT_NONE)
        return 0;
    if (ring->event_idx)
        store16(avail_event(ring), ring->next_avail);
    else
        store16(&ring->used->flags, 0);
    /* Full: our store against the load of avail->idx below. It pairs with the driver's full
     * barrier between moving idx and reading avail_event or flags. Without it the driver could
     * skip the kick while we miss its chain. */
    atomic_thread_fence(memory_order_seq_cst);
    return __atomic_load_n(&ring->avail->idx, __ATOMIC_ACQUIRE) != ring->next_avail;
}
