/* Guest memory: the one checked door from a guest physical address to bytes. */
#ifndef AV_GMEM_H
#define AV_GMEM_H

#include <stddef.h>
#include <stdint.h>

/* cdef begin */
struct av_gmem_region {
    uint64_t gpa;
    uint64_t size_bytes;
    uint8_t *hva;
};

/* Set up by Python before any vCPU runs; changed only while no ring runs. */
struct av_gmem {
    uint32_t count;
    struct av_gmem_region region[8];
};

/* Host address of [gpa, gpa + size_bytes); NULL unless it is not empty and lies in one region. */
uint8_t *av_gmem_hva(const struct av_gmem *mem, uint64_t gpa, uint64_t size_bytes);
/* cdef end */

#define AV_GMEM_REGIONS_MAX 8

static inline uint8_t *av_gmem_region_hva(const struct av_gmem_region *region, uint64_t gpa,
                                          uint64_t size_bytes)
{
    /* Subtractions only: gpa and size are the guest's and their sum may wrap. */
    if (gpa < region->gpa || size_bytes == 0 || size_bytes > region->size_bytes ||
        gpa - region->gpa > region->size_bytes - size_bytes)
        return NULL;
    return region->hva + (gpa - region->gpa);
}

/* As av_gmem_hva(), for who asks often: the region of the last answer is looked at first. */
static inline uint8_t *av_gmem_hva_near(const struct av_gmem *mem,
                                        const struct av_gmem_region **near, uint64_t gpa,
                                        uint64_t size_bytes)
{
    uint8_t *hva = av_gmem_region_hva(*near, gpa, size_bytes);

    for (uint32_t i = 0; hva == NULL && i < mem->count; i++) {
        hva = av_gmem_region_hva(&mem->region[i], gpa, size_bytes);
        if (hva != NULL)
            *near = &mem->region[i];
    }
    return hva;
}

#endif
