#include <string.h>

#include "fuzz.h"

#define F_INDIRECT_DESC (1ull << 28)
#define F_EVENT_IDX (1ull << 29)
#define F_RING_PACKED (1ull << 34)
#define F_IN_ORDER (1ull << 35)

#define DESC_AVAIL (1u << 7)
#define DESC_USED (1u << 15)
#define SIZE_MAX_LOG2 4u
#define SEGMENTS_MAX 5u

static uint64_t features_of(uint8_t bits, bool packed)
{
    return (bits & 1 ? F_INDIRECT_DESC : 0) | (bits & 2 ? F_EVENT_IDX : 0) |
           (bits & 4 ? F_IN_ORDER : 0) | (packed ? F_RING_PACKED : 0);
}

static uint64_t lay_out(struct fuzz_guest *guest, uint32_t bytes, void *hva)
{
    uint64_t gpa = fuzz_guest_add(guest, bytes);

    *(void **)hva = guest->mem.region[guest->mem.count - 1].hva;
    return gpa;
}

void fuzz_queue_init(struct fuzz_queue *queue, struct fuzz_guest *guest, struct fuzz_input *in,
                     bool packed)
{
    uint32_t size = 1u << fuzz_below(in, SIZE_MAX_LOG2 + 1);
    uint8_t bits = fuzz_u8(in);
    void *device;

    if (packed) /* any size will do */
        size += bits >> 4;
    memset(queue, 0, sizeof(*queue));
    queue->guest = guest;
    queue->setup.size = size;
    queue->setup.features = features_of(bits, packed);
    queue->setup.desc_gpa = lay_out(guest, size * 16, &queue->desc);
    queue->setup.driver_gpa = lay_out(guest, packed ? 4 : 6 + 2 * size, &queue->avail);
    queue->setup.device_gpa = lay_out(guest, packed ? 4 : 6 + 8 * size, &device);
    queue->wrap = true;
    queue->interrupt = av_interrupt_create(-1);
    queue->ring = av_vring_create(&guest->mem, queue->interrupt);
    CHECK(queue->interrupt != NULL && queue->ring != NULL);
    CHECK(av_vring_start(queue->ring, &queue->setup) == 0);
}

void fuzz_queue_fini(struct fuzz_queue *queue)
{
    av_vring_destroy(queue->ring);
    av_interrupt_destroy(queue->interrupt);
}

static bool is_packed(const struct fuzz_queue *queue)
{
    return (queue->setup.features & F_RING_PACKED) != 0;
}

void fuzz_queue_restart(struct fuzz_queue *queue)
{
    memset(queue->desc, 0, queue->setup.size * sizeof(*queue->desc));
    if (!is_packed(queue))
        queue->avail->idx = 0;
    queue->at = queue->idx = 0;
    queue->wrap = true;
    av_vring_stop(queue->ring);
    CHECK(av_vring_start(queue->ring, &queue->setup) == 0);
}

/* The descriptors of a chain in a packed ring; those after the first are written before it. */
static void offer_packed(struct fuzz_queue *queue, const struct av_desc *segment, uint32_t count)
{
    uint16_t id = queue->at;

    for (uint32_t i = 0; i < count; i++) {
        uint16_t flags = (uint16_t)(segment[i].rest >> 32);

        flags |= queue->wrap ? DESC_AVAIL : DESC_USED;
        if (i + 1 < count)
            flags |= AV_DESC_NEXT;
        queue->desc[queue->at] = (struct av_desc){
            .gpa = segment[i].gpa,
            .rest = (uint32_t)segment[i].rest | (uint64_t)id << 32 | (uint64_t)flags << 48,
        };
        if (++queue->at == queue->setup.size) {
            queue->at = 0;
            queue->wrap = !queue->wrap;
        }
    }
}

static void offer_split(struct fuzz_queue *queue, const struct av_desc *segment, uint32_t count)
{
    uint16_t mask = (uint16_t)(queue->setup.size - 1), head = queue->at & mask;

    for (uint32_t i = 0; i < count; i++) {
        uint16_t flags = (uint16_t)(segment[i].rest >> 32), at = queue->at & mask;

        queue->at++;
        if (i + 1 < count)
            flags |= AV_DESC_NEXT;
        queue->desc[at] = (struct av_desc){
            .gpa = segment[i].gpa,
            .rest = (uint32_t)segment[i].rest | (uint64_t)flags << 32 |
                    (uint64_t)(queue->at & mask) << 48,
        };
    }
    queue->avail->ring[queue->idx & mask] = head;
    queue->avail->idx = ++queue->idx;
}

void fuzz_queue_offer(struct fuzz_queue *queue, const struct av_desc *segment, uint32_t count)
{
    if (is_packed(queue))
        offer_packed(queue, segment, count);
    else
        offer_split(queue, segment, count);
}

static uint64_t any_data_gpa(const struct fuzz_guest *guest, struct fuzz_input *in)
{
    return guest->data_gpa + fuzz_u16(in) % (guest->end_gpa - guest->data_gpa);
}

/* A segment, mostly within the data; a bit of `how` for what else it may be. */
static struct av_desc any_segment(struct fuzz_queue *queue, struct fuzz_input *in)
{
    uint8_t how = fuzz_u8(in);
    uint16_t flags = how & 1 ? AV_DESC_WRITE : 0;
    uint64_t gpa, bytes;

    if ((how & 0xf0) == 0xf0)
        flags |= how & (AV_DESC_NEXT | AV_DESC_INDIRECT | AV_DESC_WRITE);
    gpa = (how & 0x0e) == 0x0e ? fuzz_number(in)
                               : any_data_gpa(queue->guest, in);
    bytes = (how & 0x30) == 0x30 ? fuzz_number(in) : fuzz_u8(in);
    if ((how & 0x40) && bytes < 256)
        bytes *= 16;
    return fuzz_segment(gpa, (uint32_t)bytes, flags);
}

static void offer_any(struct fuzz_queue *queue, struct fuzz_input *in)
{
    struct av_desc segment[SEGMENTS_MAX];
    uint32_t count = 1 + fuzz_below(in, SEGMENTS_MAX);

    for (uint32_t i = 0; i < count; i++)
        segment[i] = any_segment(queue, in);
    fuzz_queue_offer(queue, segment, count);
}

/* A table somewhere in the data, its entries one after the other, and the descriptor for it. */
static void offer_indirect(struct fuzz_queue *queue, struct fuzz_input *in)
{
    uint64_t gpa = any_data_gpa(queue->guest, in);
    uint32_t count = 1 + fuzz_below(in, SEGMENTS_MAX);
    uint8_t *table = av_gmem_hva(&queue->guest->mem, gpa, 16 * count);
    struct av_desc indirect = fuzz_segment(gpa, 16 * count, AV_DESC_INDIRECT);

    for (uint32_t i = 0; table != NULL && i < count; i++) {
        struct av_desc entry = any_segment(queue, in);
        uint16_t flags = (uint16_t)(entry.rest >> 32);

        if (i + 1 < count)
            flags |= AV_DESC_NEXT;
        entry.rest = is_packed(queue)
                         ? (uint32_t)entry.rest | (uint64_t)flags << 48
                         : (uint32_t)entry.rest | (uint64_t)flags << 32 | (uint64_t)(i + 1) << 48;
        memcpy(table + 16 * i, &entry, sizeof(entry));
    }
    fuzz_queue_offer(queue, &indirect, 1);
}

/* The driver's event suppression: a word of a packed ring, flags or used_event of a split one. */
static void suppress(struct fuzz_queue *queue, struct fuzz_input *in)
{
    uint32_t word = fuzz_u32(in);

    if (is_packed(queue)) {
        memcpy(queue->avail, &word, sizeof(word));
        return;
    }
    queue->avail->flags = (uint16_t)word;
    queue->avail->ring[queue->setup.size] = (uint16_t)(word >> 16);
}

void fuzz_queue_step(struct fuzz_queue *queue, struct fuzz_input *in)
{
    switch (fuzz_below(in, 8)) {
    case 0:
        suppress(queue, in);
        break;
    case 1:
        fuzz_guest_scribble(queue->guest, in);
        break;
    case 2: /* what it has not written, again or twice */
        if (is_packed(queue))
            queue->at = (uint16_t)(fuzz_u8(in) % queue->setup.size);
        else
            queue->avail->idx = queue->idx = (uint16_t)(queue->idx + (int8_t)fuzz_u8(in));
        break;
    case 3:
    case 4:
        offer_indirect(queue, in);
        break;
    default:
        offer_any(queue, in);
    }
}

void fuzz_queue_check_chain(const struct fuzz_queue *queue, const struct av_chain *chain,
                            uint32_t iov_max)
{
    uint32_t count = (uint32_t)chain->readable + chain->writable;
    uint64_t readable = 0, writable = 0;

    CHECK(chain->head < queue->ring->size);
    CHECK(count != 0 && count <= iov_max);
    if (!queue->ring->indirect)
        CHECK(count <= queue->ring->size);
    for (uint32_t i = 0; i < count; i++) {
        const struct iovec *iov = &chain->iov[i];

        CHECK(iov->iov_len != 0);
        CHECK(fuzz_guest_holds(queue->guest, iov->iov_base, iov->iov_len));
        *(i < chain->readable ? &readable : &writable) += iov->iov_len;
    }
    CHECK(readable == chain->readable_bytes && writable == chain->writable_bytes);
    CHECK(readable + writable <= UINT32_MAX);
}
