/* The driver's side of a queue, which load and tests use, with a device that breaks the rules. */
#include <string.h>

#include "fuzz.h"
#include "vdriver_internal.h"

#define F_INDIRECT_DESC (1ull << 28)
#define F_EVENT_IDX (1ull << 29)
#define F_RING_PACKED (1ull << 34)
#define SIZE_MAX_LOG2 4u
#define TOKENS_MAX 32u

struct load {
    struct fuzz_guest guest;
    struct av_vdriver *driver;
    bool out[TOKENS_MAX]; /* by token */
    uint16_t chains;      /* out */
};

static void create(struct load *load, struct fuzz_input *in)
{
    uint8_t bits = fuzz_u8(in);
    bool packed = bits & 1;
    uint32_t size = (1u << fuzz_below(in, SIZE_MAX_LOG2 + 1)) + (packed ? bits >> 5 : 0);
    struct av_vdriver_setup setup = {
        .mem = &load->guest.mem,
        .features = (packed ? F_RING_PACKED : 0) | (bits & 2 ? F_EVENT_IDX : 0) |
                    (bits & 4 ? F_INDIRECT_DESC : 0),
        .size = size,
        .kick_fd = -1,
        .call_fd = -1,
    };
    int error;

    fuzz_guest_init(&load->guest);
    setup.desc_gpa = fuzz_guest_add(&load->guest, size * 16);
    setup.driver_gpa = fuzz_guest_add(&load->guest, packed ? 4 : 6 + 2 * size);
    setup.device_gpa = fuzz_guest_add(&load->guest, packed ? 4 : 6 + 8 * size);
    setup.table_gpa = fuzz_guest_add(&load->guest, size * AV_VDRIVER_SEGMENTS_MAX * 16);
    load->driver = av_vdriver_create(&setup, &error);
    CHECK(load->driver != NULL);
}

static void add(struct load *load, struct fuzz_input *in)
{
    struct av_vdriver_segment segments[AV_VDRIVER_SEGMENTS_MAX] = { { 0 } };
    uint8_t how = fuzz_u8(in);
    uint32_t token = 0;

    while (token < TOKENS_MAX && load->out[token])
        token++;
    if (token == TOKENS_MAX || !av_vdriver_add(load->driver, segments, how & 3, how >> 2 & 3, token))
        return;
    load->out[token] = true;
    load->chains++;
}

static void take(struct load *load)
{
    uint32_t token = UINT32_MAX, written;
    int taken = av_vdriver_take(load->driver, &token, &written);

    CHECK(taken == 0 || taken == 1 || taken == -EPROTO);
    if (taken != 1)
        return;
    CHECK(token < TOKENS_MAX && load->out[token]);
    load->out[token] = false;
    load->chains--;
}

/* What the device would write: mostly where the next used chain is looked for. */
static void use(struct load *load, struct fuzz_input *in)
{
    struct av_vdriver *driver = load->driver;
    uint16_t id = fuzz_u8(in) % (driver->size + 1);
    uint32_t elem[2] = { id, fuzz_u8(in) };

    if (driver->packed) {
        uint16_t flags = driver->used_wrap ? 0x8080 : 0;
        uint8_t *desc = driver->desc + 16 * driver->next_used;

        memcpy(desc + 12, &id, 2);
        memcpy(desc + 14, &flags, 2);
        return;
    }
    memcpy(driver->device_area + 4 + 8 * (driver->next_used % driver->size), elem, 8);
    memcpy(driver->device_area + 2, &(uint16_t){ driver->next_used + 1 }, 2);
}

/* Each descriptor is free or in a chain, and the free ones are all different. */
static void check(const struct load *load)
{
    const struct av_vdriver *driver = load->driver;
    uint32_t used = 0, chains = 0, free = 0;
    bool seen[32] = { false };
    uint16_t at = driver->first_free;

    for (uint32_t i = 0; i < driver->size; i++) {
        used += driver->note[i].count;
        chains += driver->note[i].count != 0;
    }
    CHECK(used + driver->free == driver->size);
    CHECK(chains == load->chains);
    /* Of a packed ring it is ids that are in the list: one a chain. */
    for (; free < (driver->packed ? driver->size - chains : driver->free); free++) {
        CHECK(at < driver->size && !seen[at]);
        seen[at] = true;
        at = driver->next_free[at];
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input in = { data, size };
    struct load load = { 0 };

    create(&load, &in);
    while (fuzz_more(&in)) {
        uint32_t op = fuzz_below(&in, 12);

        if (op < 3)
            add(&load, &in);
        else if (op < 5)
            take(&load);
        else if (op < 8)
            use(&load, &in);
        else if (op == 8)
            av_vdriver_publish(load.driver);
        else if (op == 9)
            av_vdriver_interrupts_on(load.driver);
        else if (op == 10)
            av_vdriver_interrupts_off(load.driver);
        else
            fuzz_guest_scribble(&load.guest, &in);
        check(&load);
    }
    av_vdriver_destroy(load.driver);
    fuzz_guest_fini(&load.guest);
    return 0;
}
