/* Random histories of one ring: what the two layouts' targets share. */
#ifndef AV_FUZZ_RING_H
#define AV_FUZZ_RING_H

#include "fuzz.h"

void fuzz_ring(const uint8_t *data, size_t size, bool packed);

#endif
