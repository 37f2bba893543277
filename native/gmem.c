#include "gmem.h"

uint8_t *av_gmem_hva(const struct av_gmem *mem, uint64_t gpa, uint64_t size_bytes)
{
    const struct av_gmem_region *first = &mem->region[0];

    return mem->count == 0 ? NULL : av_gmem_hva_near(mem, &first, gpa, size_bytes);
}
