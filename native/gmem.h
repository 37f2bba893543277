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

#endif
