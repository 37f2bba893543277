#include "vdriver_internal.h"

#include <errno.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SIZE_MAX_ENTRIES 1024u
#define F_INDIRECT_DESC (1ull << 28)
#define F_EVENT_IDX (1ull << 29)
#define F_RING_PACKED (1ull << 34)

/* The ring's three areas, checked; 0 or -errno. */
static int place(struct av_vdriver *d, const struct av_vdriver_setup *setup)
{
    uint64_t size = setup->size;
    uint64_t driver_bytes = d->packed ? sizeof(struct packed_event) : 6 + 2 * size;
    uint64_t device_bytes = d->packed ? sizeof(struct packed_event) : 6 + 8 * size;
    uint64_t align = d->packed ? 4 : 2;
    uint64_t table_bytes = size * AV_VDRIVER_SEGMENTS_MAX * 16;

    if (size == 0 || size > SIZE_MAX_ENTRIES || (!d->packed && (size & (size - 1)) != 0) ||
        setup->desc_gpa % 16 != 0 || setup->driver_gpa % align != 0 || setup->device_gpa % 4 != 0)
        return -EINVAL;
    d->desc = av_gmem_hva(d->mem, setup->desc_gpa, 16 * size);
    d->driver_area = av_gmem_hva(d->mem, setup->driver_gpa, driver_bytes);
    d->device_area = av_gmem_hva(d->mem, setup->device_gpa, device_bytes);
    if (d->desc == NULL || d->driver_area == NULL || d->device_area == NULL)
        return -EFAULT;
    memset(d->desc, 0, 16 * size);
    memset(d->driver_area, 0, driver_bytes);
    memset(d->device_area, 0, device_bytes);
    if (setup->features & F_INDIRECT_DESC) {
        d->tables = av_gmem_hva(d->mem, setup->table_gpa, table_bytes);
        if (d->tables == NULL)
            return -EFAULT;
    }
    return 0;
}

struct av_vdriver *av_vdriver_create(const struct av_vdriver_setup *setup, int *error)
{
    struct av_vdriver *d = calloc(1, sizeof(*d));

    *error = -ENOMEM;
    if (d == NULL)
        return NULL;
    d->mem = setup->mem;
    d->table_gpa = setup->table_gpa;
    d->packed = (setup->features & F_RING_PACKED) != 0;
    d->event_idx = (setup->features & F_EVENT_IDX) != 0;
    d->avail_wrap = d->used_wrap = true;
    d->kick_fd = setup->kick_fd;
    d->call_fd = setup->call_fd;
    *error = place(d, setup);
    if (*error != 0) {
        av_vdriver_destroy(d);
        return NULL;
    }
    d->size = d->free = (uint16_t)setup->size;
    d->note = calloc(d->size, sizeof(*d->note));
    d->next_free = calloc(d->size, sizeof(*d->next_free));
    if (d->note == NULL || d->next_free == NULL) {
        *error = -ENOMEM;
        av_vdriver_destroy(d);
        return NULL;
    }
    for (uint32_t i = 0; i < d->size; i++)
        d->next_free[i] = (uint16_t)(i + 1);
    return d;
}

void av_vdriver_destroy(struct av_vdriver *d)
{
    free(d->note);
    free(d->next_free);
    free(d);
}

int av_vdriver_add(struct av_vdriver *d, const struct av_vdriver_segment *segments,
                   uint32_t readable, uint32_t writable, uint32_t token)
{
    uint32_t count = readable + writable;

    if (count == 0 || count > AV_VDRIVER_SEGMENTS_MAX || d->free < (d->tables ? 1 : count))
        return 0;
    d->stats.added++;
    return d->packed ? av_packed_add(d, segments, readable, writable, token)
                     : av_split_add(d, segments, readable, writable, token);
}

int av_vdriver_publish(struct av_vdriver *d)
{
    uint64_t one = 1;

    if (d->unpublished == 0)
        return 0;
    if (!(d->packed ? av_packed_publish(d) : av_split_publish(d))) {
        d->stats.kicks_suppressed++;
        return 0;
    }
    d->stats.kicks++;
    /* A counter that is full already says that there is a kick. */
    if (d->kick_fd >= 0 && write(d->kick_fd, &one, sizeof(one)) < 0)
        return 1;
    return 1;
}

int av_vdriver_take(struct av_vdriver *d, uint32_t *token, uint32_t *written_bytes)
{
    int taken = d->packed ? av_packed_take(d, token, written_bytes)
                          : av_split_take(d, token, written_bytes);

    d->stats.taken += taken > 0;
    return taken;
}

void av_vdriver_interrupts_off(struct av_vdriver *d)
{
    if (d->quiet)
        return;
    d->quiet = true;
    if (d->packed)
        av_packed_interrupts(d, false);
    else
        av_split_interrupts(d, false);
}

int av_vdriver_interrupts_on(struct av_vdriver *d)
{
    d->quiet = false;
    if (d->packed)
        av_packed_interrupts(d, true);
    else
        av_split_interrupts(d, true);
    /* Full: our wish for an interrupt against the look at the ring below. It pairs with the
     * device's full barrier between showing a used chain and reading the wish. Without it both
     * could miss the other's store, and we would sleep beside a chain that is done. */
    atomic_thread_fence(memory_order_seq_cst);
    return d->packed ? av_packed_more(d) : av_split_more(d);
}

int av_vdriver_wait(struct av_vdriver *d)
{
    uint64_t count;

    for (;;) {
        if (read(d->call_fd, &count, sizeof(count)) == sizeof(count)) {
            d->stats.interrupts += count;
            return 0;
        }
        /* The device shares the descriptor's flags with us, and may have made it non-blocking. */
        if (errno == EAGAIN) {
            struct pollfd call = { .fd = d->call_fd, .events = POLLIN };
            if (poll(&call, 1, -1) < 0 && errno != EINTR)
                return -errno;
        } else if (errno != EINTR) {
            return -errno;
        }
    }
}

void av_vdriver_statistics(const struct av_vdriver *d, struct av_vdriver_stats *out)
{
    *out = d->stats;
}
