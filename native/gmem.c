#include "gmem.h"

uint8_t *av_gmem_hva(const struct av_gmem *mem, uint64_t gpa, uint64_t size_bytes)
{
    for (uint32_t i = 0; i < mem->count; i++) {
        const struct av_gmem_region *region = &mem->region[i];
        /* Subtractions only: gpa and size are the guest's and their sum may wrap. */
        if (gpa < region->gpa || size_bytes == 0 || size_bytes > region->size_bytes)
            continue;
        if (gpa - region->gpa <= region->size_bytes - size_bytes)
            return region->hva + (gpa - region->gpa);
    }
    return NULL;
}
