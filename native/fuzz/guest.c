#include <string.h>

#include "fuzz.h"

#define FIRST_GPA 0x1000u
#define SCRIBBLE_MAX 32u

#if defined(__SANITIZE_THREAD__)
#define WATCHES_THREADS 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define WATCHES_THREADS 1
#endif
#endif

#ifdef WATCHES_THREADS
/* A guest writes its memory whenever it likes, and may give the same bytes to two devices: those
 * are no races of ours, as long as what we decide by is copied once. So ThreadSanitizer is told
 * not to look at guest memory, and it all comes from one place, since it never forgets that. */
#define ARENA_BYTES (1u << 20)

void AnnotateBenignRaceSized(const char *file, int line, const volatile void *at, size_t bytes,
                             const char *why);

/* libFuzzer's own counters of edges, where there are some: a count lost is no defect. */
extern uint8_t __start___sancov_cntrs[] __attribute__((weak));
extern uint8_t __stop___sancov_cntrs[] __attribute__((weak));

static _Alignas(64) uint8_t arena[ARENA_BYTES];
static uint32_t arena_used, arena_users;

__attribute__((constructor)) static void tell(void)
{
    AnnotateBenignRaceSized(__FILE__, __LINE__, arena, sizeof(arena), "guest memory");
    AnnotateBenignRaceSized(__FILE__, __LINE__, __start___sancov_cntrs,
                            (size_t)(__stop___sancov_cntrs - __start___sancov_cntrs), "edges");
}

static void begin(void)
{
    arena_users++;
}

static uint8_t *allocate(uint32_t bytes)
{
    uint8_t *at = arena + arena_used;

    CHECK(bytes <= ARENA_BYTES - arena_used);
    arena_used += (bytes + 63) & ~63u;
    memset(at, 0, bytes);
    return at;
}

static void release(struct fuzz_guest *guest)
{
    (void)guest;
    if (--arena_users == 0)
        arena_used = 0;
}
#else
static void begin(void)
{
}

static uint8_t *allocate(uint32_t bytes)
{
    uint8_t *at = calloc(1, bytes);

    CHECK(at != NULL);
    return at;
}

static void release(struct fuzz_guest *guest)
{
    for (uint32_t i = 0; i < guest->mem.count; i++)
        free(guest->mem.region[i].hva);
}
#endif

void fuzz_guest_init(struct fuzz_guest *guest)
{
    memset(guest, 0, sizeof(*guest));
    guest->end_gpa = FIRST_GPA;
    begin();
}

void fuzz_guest_fini(struct fuzz_guest *guest)
{
    release(guest);
}

uint64_t fuzz_guest_add(struct fuzz_guest *guest, uint32_t size_bytes)
{
    struct av_gmem_region *region = &guest->mem.region[guest->mem.count++];

    CHECK(guest->mem.count <= AV_GMEM_REGIONS_MAX);
    *region = (struct av_gmem_region){ .gpa = (guest->end_gpa + 15) & ~15ull,
                                       .size_bytes = size_bytes,
                                       .hva = allocate(size_bytes) };
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
