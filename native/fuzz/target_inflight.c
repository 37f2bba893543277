/* What a split ring keeps of what is in flight, for the next process: whatever is in that memory,
 * and a process that dies at any time. */
#include <string.h>

#include "fuzz.h"

#define IOV_MAX_HERE 6u
#define TAKEN_MAX 64u
#define DATA_BYTES 96u

struct back_end {
    struct fuzz_guest guest;
    struct fuzz_queue queue;
    uint8_t *region;
    uint32_t region_bytes;
    uint16_t taken[TAKEN_MAX]; /* and not shown to the driver as used, in that order; */
    bool pushed[TAKEN_MAX];    /* of these, given back */
    uint32_t count;
    uint32_t again; /* at the front: to be taken again, if the region is ours */
    bool ours;      /* nobody else wrote the region or the used ring, no head came twice */
};

static uint32_t find(const struct back_end *back_end, uint16_t head)
{
    uint32_t index = 0;

    while (index < back_end->count && back_end->taken[index] != head)
        index++;
    return index;
}

static void pop(struct back_end *back_end)
{
    struct av_chain chain;
    struct iovec iov[IOV_MAX_HERE];
    int result = av_vring_pop(back_end->queue.ring, &chain, iov, IOV_MAX_HERE);

    CHECK(result == 0 || result == 1 || result == -EPROTO);
    if (result == 1)
        fuzz_queue_check_chain(&back_end->queue, &chain, IOV_MAX_HERE);
    if (back_end->again != 0 && back_end->ours) {
        uint32_t next = back_end->count - back_end->again;

        CHECK(result != 0);
        if (result == 1)
            CHECK(chain.head == back_end->taken[next]);
        back_end->again -= result == 1;
        return;
    }
    if (result != 1)
        return;
    if (find(back_end, chain.head) != back_end->count)
        back_end->ours = false;
    else
        back_end->taken[back_end->count++] = chain.head;
}

static void push(struct back_end *back_end, struct fuzz_input *in)
{
    uint32_t there = back_end->ours ? back_end->count - back_end->again : back_end->count;
    uint32_t index = there == 0 ? 0 : fuzz_below(in, there);

    if (there == 0 || back_end->pushed[index])
        return;
    av_vring_push(back_end->queue.ring, back_end->taken[index], 0);
    back_end->pushed[index] = true;
}

static void flush(struct back_end *back_end)
{
    uint32_t kept = 0;

    av_vring_flush(back_end->queue.ring);
    for (uint32_t i = 0; i < back_end->count; i++)
        if (!back_end->pushed[i])
            back_end->taken[kept++] = back_end->taken[i];
    back_end->count = kept;
    memset(back_end->pushed, 0, sizeof(back_end->pushed));
}

/* The process is gone, and the next resumes. */
static void die(struct back_end *back_end)
{
    struct av_vring *ring = back_end->queue.ring;
    struct av_vring_setup setup = back_end->queue.setup;

    setup.resume = 1;
    setup.base = av_vring_base(ring);
    setup.inflight = back_end->region;
    av_vring_stop(ring);
    CHECK(av_vring_start(ring, &setup) == 0);
    CHECK(ring->inflight.agains <= ring->size);
    if (back_end->ours) {
        CHECK(ring->inflight.agains == back_end->count);
        back_end->again = back_end->count;
    } else {
        back_end->count = back_end->again = 0;
    }
    memset(back_end->pushed, 0, sizeof(back_end->pushed));
}

static void scribble(struct back_end *back_end, struct fuzz_input *in)
{
    uint32_t at = fuzz_u16(in) % back_end->region_bytes, count = 1 + fuzz_below(in, 24);

    back_end->ours = false;
    if (fuzz_u8(in) & 1) {
        fuzz_guest_scribble(&back_end->guest, in);
        return;
    }
    if (count > back_end->region_bytes - at)
        count = back_end->region_bytes - at;
    fuzz_bytes(in, back_end->region + at, count);
}

/* Offers of chains, not at random places in memory. */
static void offer(struct back_end *back_end, struct fuzz_input *in)
{
    uint32_t bytes = 1 + fuzz_u8(in) % DATA_BYTES;
    struct av_desc segment = fuzz_segment(back_end->guest.data_gpa, bytes, fuzz_u8(in) & 2);

    if (back_end->ours && back_end->count < back_end->queue.setup.size)
        fuzz_queue_offer(&back_end->queue, &segment, 1);
    else if (!back_end->ours)
        fuzz_queue_step(&back_end->queue, in);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input in = { data, size };
    struct back_end back_end = { .ours = true };

    fuzz_guest_init(&back_end.guest);
    fuzz_queue_init(&back_end.queue, &back_end.guest, &in, false);
    fuzz_guest_add_data(&back_end.guest, DATA_BYTES);
    back_end.region_bytes = av_vring_inflight_bytes(back_end.queue.setup.size);
    back_end.region = calloc(1, back_end.region_bytes);
    CHECK(back_end.region != NULL);
    die(&back_end); /* of another back-end, which left nothing */
    while (fuzz_more(&in)) {
        uint32_t op = fuzz_below(&in, 12);

        if (op < 4)
            offer(&back_end, &in);
        else if (op < 7 && back_end.count < TAKEN_MAX)
            pop(&back_end);
        else if (op < 9)
            push(&back_end, &in);
        else if (op == 9)
            flush(&back_end);
        else if (op == 10)
            die(&back_end);
        else if (op == 11)
            scribble(&back_end, &in);
    }
    free(back_end.region);
    fuzz_queue_fini(&back_end.queue);
    fuzz_guest_fini(&back_end.guest);
    return 0;
}
