#include "ring.h"

#include <string.h>

#define IOV_MAX_HERE 6u
#define TAKEN_MAX 64u
#define DATA_BYTES 96u /* two of them, next to one another */

struct taken {
    uint16_t head;
    uint16_t before;  /* where the ring stood when it was popped, */
    uint16_t descs;   /* and how many places it takes of the ring */
    uint32_t writable_bytes;
};

/* floor: those before it were not popped last, and cannot be given back by unpop. */
struct history {
    struct fuzz_guest guest;
    struct fuzz_queue queue;
    struct av_vring_setup setup; /* what the ring was started with last */
    struct taken taken[TAKEN_MAX];
    uint32_t count, floor;
    uint32_t unshown; /* places given back since the driver was last shown any, */
    uint32_t unsaid;  /* and since the last flush */
};

static struct av_vring_stats stats_of(const struct history *history)
{
    struct av_vring_stats stats;

    av_vring_statistics(history->queue.ring, &stats);
    return stats;
}

/* How far a position moved, in places of the ring: one a chain in a split ring. */
static uint16_t moved(const struct av_vring_stats *now, uint16_t from, uint16_t to)
{
    uint32_t size = now->size;

    if (!now->packed)
        return (uint16_t)(to - from);
    return (uint16_t)((to > from ? 0 : size) + to - from);
}

static void pop(struct history *history)
{
    struct av_vring_stats before = stats_of(history), after;
    struct iovec *iov = malloc(IOV_MAX_HERE * sizeof(*iov));
    struct av_chain chain;
    int result;

    CHECK(iov != NULL);
    result = av_vring_pop(history->queue.ring, &chain, iov, IOV_MAX_HERE);
    after = stats_of(history);
    CHECK(after.chains - before.chains == (result == 1));
    CHECK(after.next_used == before.next_used);
    if (result == 1) {
        fuzz_queue_check_chain(&history->queue, &chain, IOV_MAX_HERE);
        history->taken[history->count++] = (struct taken){
            .head = chain.head,
            .before = before.next_avail,
            .descs = moved(&after, before.next_avail, after.next_avail),
            .writable_bytes = chain.writable_bytes,
        };
        CHECK(after.packed || history->taken[history->count - 1].descs == 1);
    } else {
        CHECK(after.next_avail == before.next_avail);
        CHECK(result == (after.running && after.fault != AV_FAULT_NONE ? -EPROTO : 0));
        CHECK(after.fault == AV_FAULT_NONE || !av_vring_pending(history->queue.ring));
    }
    free(iov);
}

static void forget(struct history *history, uint32_t index)
{
    history->count--;
    memmove(&history->taken[index], &history->taken[index + 1],
            (history->count - index) * sizeof(history->taken[0]));
}

static void push(struct history *history, struct fuzz_input *in)
{
    bool in_order = stats_of(history).in_order;
    uint32_t index = in_order ? 0 : fuzz_below(in, history->count);
    struct taken taken = history->taken[index];
    struct av_vring_stats before = stats_of(history), after;
    uint8_t how = fuzz_u8(in);

    av_vring_push(history->queue.ring, taken.head, how & 1 ? taken.writable_bytes : how / 2u);
    after = stats_of(history);
    forget(history, index);
    history->floor = index < history->floor ? history->floor - 1 : index;
    CHECK(after.used - before.used == before.running);
    if (!before.running)
        return;
    CHECK(moved(&after, before.next_used, after.next_used) == taken.descs);
    history->unshown += taken.descs;
    history->unsaid += taken.descs;
}

static void unpop(struct history *history)
{
    struct taken taken = history->taken[history->count - 1];
    uint64_t chains = stats_of(history).chains;

    av_vring_unpop(history->queue.ring);
    forget(history, history->count - 1);
    CHECK(stats_of(history).next_avail == taken.before);
    CHECK(stats_of(history).chains == chains - 1);
}

static void show(struct history *history)
{
    struct av_vring *ring = history->queue.ring;

    av_vring_show(ring);
    if (ring->running && history->unshown != 0 && !ring->is_packed)
        CHECK(ring->split.used->idx == ring->next_used);
    history->unshown = 0;
}

/* Virtio 1.3 section 2.7.7.2, for what was given back since the last flush. */
static bool split_wants_interrupt(const struct av_vring *ring, uint32_t count)
{
    const struct av_avail *avail = ring->split.avail;

    if (!ring->event_idx)
        return (avail->flags & 1) == 0;
    return (uint16_t)(ring->next_used - avail->ring[ring->size] - 1) < count;
}

static void flush(struct history *history)
{
    struct av_vring *ring = history->queue.ring;
    struct av_vring_stats before = stats_of(history), after;
    uint32_t count = history->unsaid;

    av_vring_flush(ring);
    after = stats_of(history);
    history->unshown = history->unsaid = 0;
    CHECK(after.interrupts - before.interrupts + after.suppressed - before.suppressed ==
          (before.running && count != 0));
    if (!before.running || count == 0 || ring->is_packed)
        return;
    CHECK(ring->split.used->idx == ring->next_used);
    CHECK((after.interrupts != before.interrupts) == split_wants_interrupt(ring, count));
}

static void kicks(struct history *history, bool on)
{
    struct av_vring *ring = history->queue.ring;

    if (!on)
        av_vring_kicks_off(ring);
    else
        CHECK(av_vring_kicks_on(ring) == av_vring_pending(ring));
}

static void begin_again(struct history *history)
{
    history->count = history->floor = history->unshown = history->unsaid = 0;
}

/* Stop, and go on where it stood, as another process would. */
static void resume(struct history *history)
{
    struct av_vring *ring = history->queue.ring;
    uint32_t base;

    flush(history);
    while (history->count > history->floor)
        unpop(history);
    base = av_vring_base(ring);
    /* No ring is left with some in flight. */
    if (history->count != 0 || !ring->running || (ring->is_packed && base >> 16 != (base & 0xFFFF)))
        return;
    av_vring_stop(ring);
    history->setup.resume = 1;
    history->setup.base = base;
    CHECK(av_vring_start(ring, &history->setup) == 0);
    CHECK(av_vring_base(ring) == base);
    begin_again(history);
}

/* A setup of no sense: the driver chooses sizes and addresses too. */
static void start_anywhere(struct history *history, struct fuzz_input *in)
{
    struct av_vring_setup setup = history->queue.setup;
    uint8_t which = fuzz_u8(in);
    int result;

    if (which & 1)
        setup.size = (uint32_t)fuzz_number(in);
    if (which & 2)
        setup.desc_gpa = fuzz_number(in);
    if (which & 4)
        setup.driver_gpa = fuzz_number(in);
    if (which & 8)
        setup.device_gpa = fuzz_number(in);
    if (which & 16) {
        setup.resume = 1;
        setup.base = (uint32_t)fuzz_number(in);
    }
    av_vring_stop(history->queue.ring);
    result = av_vring_start(history->queue.ring, &setup);
    CHECK(result == 0 || result == -EINVAL || result == -EFAULT);
    CHECK(stats_of(history).running == (result == 0));
    history->setup = setup;
    begin_again(history);
}

static void step(struct history *history, struct fuzz_input *in)
{
    uint32_t op = fuzz_below(in, 16);

    if (op < 6)
        fuzz_queue_step(&history->queue, in);
    else if (op < 9 && history->count < TAKEN_MAX)
        pop(history);
    else if (op < 11 && history->count != 0)
        push(history, in);
    else if (op == 11 && history->count > history->floor)
        unpop(history);
    else if (op == 12)
        kicks(history, fuzz_u8(in) & 1);
    else if (op == 13)
        show(history);
    else if (op == 14)
        flush(history);
    else if (op == 15)
        switch (fuzz_below(in, 3)) {
        case 0:
            resume(history);
            break;
        case 1:
            start_anywhere(history, in);
            break;
        default:
            fuzz_queue_restart(&history->queue);
            history->setup = history->queue.setup;
            begin_again(history);
        }
}

void fuzz_ring(const uint8_t *data, size_t size, bool packed)
{
    struct fuzz_input in = { data, size };
    struct history history = { 0 };

    fuzz_guest_init(&history.guest);
    fuzz_queue_init(&history.queue, &history.guest, &in, packed);
    history.setup = history.queue.setup;
    fuzz_guest_add_data(&history.guest, DATA_BYTES);
    fuzz_guest_add_data(&history.guest, DATA_BYTES);
    while (fuzz_more(&in))
        step(&history, &in);
    fuzz_queue_fini(&history.queue);
    fuzz_guest_fini(&history.guest);
}
