/* Block requests (virtio 1.3 section 5.2.6) at a fixed depth. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "blk_req.h"
#include "load_internal.h"

#define HEADER_BYTES 16u
#define STATUS_AT 32u /* a cache line holds header and status; data begin on a page */
#define NOTE_BYTES 64u
#define PAGE_BYTES 4096u
#define STATUS_NONE 0xffu

/* The request header as the device reads it. */
struct header {
    uint32_t type;
    uint32_t reserved;
    uint64_t sector;
};
_Static_assert(sizeof(struct header) == HEADER_BYTES, "struct virtio_blk_outhdr");

/* A place for one request in flight, in shared memory. */
struct slot {
    struct header *header;
    uint8_t *status;
    uint8_t *data;
    uint64_t began_ns;
    struct av_vdriver_segment segment[3];
};

struct state {
    struct av_load_thread *thread;
    const struct av_load *load;
    const struct av_load_blk *blk;
    struct slot *slots;
    uint64_t random;
    uint64_t blocks;     /* of the disk, or of this queue's part when sequential */
    uint64_t first_block;
    uint64_t next_block;
    uint64_t begun;
    uint64_t deadline_ns;
    uint32_t in_flight;
};

uint64_t av_load_stamp(uint64_t sector)
{
    return (sector + 1) * 0x9e3779b97f4a7c15ull;
}

void av_load_stamp_sectors(uint8_t *data, uint64_t bytes, uint64_t sector)
{
    for (uint64_t at = 0; at < bytes; at += AV_BLK_SECTOR_BYTES) {
        uint64_t stamp = av_load_stamp(sector++);
        memcpy(data + at, &stamp, sizeof(stamp));
    }
}

static uint64_t mismatches(const uint8_t *data, uint64_t bytes, uint64_t sector)
{
    uint64_t wrong = 0;

    for (uint64_t at = 0; at < bytes; at += AV_BLK_SECTOR_BYTES) {
        uint64_t stamp = av_load_stamp(sector++);
        wrong += memcmp(data + at, &stamp, sizeof(stamp)) != 0;
    }
    return wrong;
}

static uint64_t data_stride(const struct av_load_blk *blk)
{
    return ((uint64_t)blk->block_bytes + PAGE_BYTES - 1) & ~(uint64_t)(PAGE_BYTES - 1);
}

static uint64_t notes_bytes(const struct av_load *load)
{
    return ((uint64_t)load->depth * NOTE_BYTES + PAGE_BYTES - 1) & ~(uint64_t)(PAGE_BYTES - 1);
}

uint64_t av_load_blk_room(const struct av_load *load, const struct av_load_blk *blk)
{
    return notes_bytes(load) + load->depth * data_stride(blk);
}

static uint64_t next_block(struct state *s)
{
    if (s->blk->sequential) {
        uint64_t block = s->next_block;
        s->next_block = block + 1 == s->blocks ? 0 : block + 1;
        return s->first_block + block;
    }
    /* xorshift64*, then a multiplication in place of the slower modulo. */
    s->random ^= s->random >> 12;
    s->random ^= s->random << 25;
    s->random ^= s->random >> 27;
    return (uint64_t)(((unsigned __int128)(s->random * 0x2545f4914f6cdd1dull) * s->blocks) >> 64);
}

/* Begin a request in a free slot; 0 or -EPROTO when the ring has no room, which cannot be. */
static int begin(struct state *s, uint32_t index, uint64_t now_ns)
{
    struct slot *slot = &s->slots[index];
    uint64_t sector = next_block(s) * (s->blk->block_bytes / AV_BLK_SECTOR_BYTES);
    bool write = s->blk->write;

    slot->header->sector = sector;
    *slot->status = STATUS_NONE;
    if (write)
        av_load_stamp_sectors(slot->data, s->blk->block_bytes, sector);
    slot->began_ns = now_ns;
    if (!av_vdriver_add(s->thread->driver, slot->segment, write ? 2 : 1, write ? 1 : 2, index))
        return -EPROTO;
    s->begun++;
    s->in_flight++;
    return 0;
}

static void end(struct state *s, struct slot *slot, uint64_t now_ns)
{
    struct av_load_result *result = &s->thread->result;

    result->requests++;
    if (*slot->status != AV_BLK_S_OK)
        result->errors++;
    else if (s->blk->verify && !s->blk->write)
        result->mismatches += mismatches(slot->data, s->blk->block_bytes, slot->header->sector);
    av_histogram_add(&s->thread->latencies, now_ns - slot->began_ns);
    s->in_flight--;
}

static bool go_on(const struct state *s, uint64_t now_ns)
{
    return (s->load->requests == 0 || s->begun < s->load->requests) &&
           (s->load->duration_ns == 0 || now_ns < s->deadline_ns);
}

/* Take what came back and put new requests into its place; how many came, or -EPROTO. */
static int turn(struct state *s)
{
    struct av_vdriver *driver = s->thread->driver;
    uint32_t index, written;
    uint64_t now_ns = 0;
    int count = 0, taken, error;

    while ((taken = av_vdriver_take(driver, &index, &written)) > 0) {
        if (count++ == 0)
            now_ns = av_load_now_ns();
        end(s, &s->slots[index], now_ns);
        if (go_on(s, now_ns)) {
            error = begin(s, index, now_ns);
            if (error != 0)
                return error;
        }
        /* A device as fast as we are could keep us here, with chains it has not been told of. */
        if ((uint32_t)count == s->load->depth)
            break;
    }
    if (taken < 0)
        return taken;
    av_vdriver_publish(driver);
    return count;
}

static int loop(struct state *s)
{
    struct av_vdriver *driver = s->thread->driver;

    while (s->in_flight != 0) {
        int count;

        if (atomic_load_explicit(&s->thread->give_up, memory_order_relaxed))
            return -ETIMEDOUT;
        count = turn(s);
        if (count < 0)
            return count;
        if (count != 0 || s->in_flight == 0)
            continue;
        if (s->load->polling) {
            __builtin_ia32_pause();
        } else if (!av_vdriver_interrupts_on(driver)) {
            int error = av_vdriver_wait(driver);
            if (error != 0)
                return error;
            av_vdriver_interrupts_off(driver);
        }
    }
    return 0;
}

/* Lay out the slots in this queue's part of the shared memory; 0 or -EFAULT. */
static int prepare(struct state *s)
{
    const struct av_load *load = s->load;
    uint64_t notes_gpa = load->data_gpa + s->thread->index * load->data_bytes;
    uint64_t data_gpa = notes_gpa + notes_bytes(load);
    uint8_t *notes = av_gmem_hva(s->thread->mem, notes_gpa, av_load_blk_room(load, s->blk));

    if (notes == NULL)
        return -EFAULT;
    memset(notes, 0, av_load_blk_room(load, s->blk)); /* its pages, before the clock runs */
    for (uint32_t i = 0; i < load->depth; i++) {
        struct slot *slot = &s->slots[i];
        uint64_t note = (uint64_t)i * NOTE_BYTES, data = i * data_stride(s->blk);

        slot->header = (struct header *)(notes + note);
        slot->header->type = s->blk->write ? AV_BLK_T_OUT : AV_BLK_T_IN;
        slot->status = notes + note + STATUS_AT;
        slot->data = notes + notes_bytes(load) + data;
        slot->segment[0] = (struct av_vdriver_segment){ notes_gpa + note, HEADER_BYTES };
        slot->segment[1] = (struct av_vdriver_segment){ data_gpa + data, s->blk->block_bytes };
        slot->segment[2] = (struct av_vdriver_segment){ notes_gpa + note + STATUS_AT, 1 };
    }
    return 0;
}

static int body(struct av_load_thread *thread)
{
    const struct av_load_blk *blk = thread->kind;
    struct state s = { .thread = thread, .load = thread->load, .blk = blk };
    uint64_t now_ns;
    int error;

    s.blocks = blk->span_bytes / blk->block_bytes;
    if (blk->sequential) {
        s.blocks /= thread->queues;
        s.first_block = s.blocks * thread->index;
    }
    s.random = (blk->seed + thread->index + 1) * 0x9e3779b97f4a7c15ull | 1;
    s.slots = calloc(s.load->depth, sizeof(*s.slots));
    if (s.slots == NULL)
        return -ENOMEM;
    error = prepare(&s);
    av_vdriver_interrupts_off(thread->driver);
    now_ns = av_load_now_ns();
    s.deadline_ns = now_ns + s.load->duration_ns;
    for (uint32_t i = 0; i < s.load->depth && error == 0 && go_on(&s, now_ns); i++)
        error = begin(&s, i, now_ns);
    if (error == 0) {
        av_vdriver_publish(thread->driver);
        error = loop(&s);
    }
    free(s.slots);
    return error;
}

int av_load_blk_run(struct av_vdriver *const *drivers, const struct av_gmem *mem, uint32_t queues,
                    const struct av_load *load, const struct av_load_blk *blk,
                    struct av_load_result *out)
{
    if (queues == 0 || queues > AV_LOAD_QUEUES_MAX || load->depth == 0 || blk->block_bytes == 0 ||
        blk->block_bytes % AV_BLK_SECTOR_BYTES != 0 ||
        blk->span_bytes / blk->block_bytes < queues ||
        av_load_blk_room(load, blk) > load->data_bytes)
        return -EINVAL;
    return av_load_run_threads(drivers, mem, queues, load, blk, body, out);
}
