#include <string.h>

#include "fuzz.h"

#define FIRST_GPA 0x1000u
#define SCRIBBLE_MAX 32u

void fuzz_guest_init(struct fuzz_guest *guest)
{
    memset(guest, 0, sizeof(*guest));
    guest->end_gpa = FIRST_GPA;
}

void fuzz_guest_fini(struct fuzz_guest *guest)
{
    for (uint32_t i = 0; i < guest->mem.count; i++)
        free(guest->mem.region[i].hva);
}

uint64_t fuzz_guest_add(struct fuzz_guest *guest, uint32_t size_bytes)
{
    struct av_gmem_region *region = &guest->mem.region[guest->mem.count++];

    CHECK(guest->mem.count <= AV_GMEM_REGIONS_MAX);
    *region = (struct av_gmem_region){ .gpa = (guest->end_gpa + 15) & ~15ull,
                                       .size_bytes = size_bytes,
                                       .hva = calloc(1, size_bytes) };
    CHECK(region->hva != NULL);
    guest->end_gpa = region->gpa + size_bytes;
    return region->gpa;
}

uint64_t fuzz_guest_add_data(struct fuzz_guest *guest, uint32_t size_bytes)
{
    uint64_t gpa = fuzz_guest_add(guest, size_bytes);

    if (guest->data_gpa == 0)
        guest->data_gpa = gpa;
    return gpa;
}

bool fuzz_guest_holds(const struct fuzz_guest *guest, const void *at, size_t bytes)
{
    for (uint32_t i = 0; i < guest->mem.count; i++) {
        const struct av_gmem_region *region = &guest->mem.region[i];
        uintptr_t from = (uintptr_t)region->hva, to = (uintptr_t)at;

        if (to >= from && to - from <= region->size_bytes &&
            bytes <= region->size_bytes - (to - from))
            return true;
    }
    return false;
}

void fuzz_guest_scribble(struct fuzz_guest *guest, struct fuzz_input *in)
{
    struct av_gmem_region *region = &guest->mem.region[fuzz_below(in, guest->mem.count)];
    uint64_t at = fuzz_u16(in) % region->size_bytes;
    uint64_t count = 1 + fuzz_below(in, SCRIBBLE_MAX);

    if (count > region->size_bytes - at)
        count = region->size_bytes - at;
    fuzz_bytes(in, region->hva + at, count);
}
