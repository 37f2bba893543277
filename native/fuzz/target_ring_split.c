/* The split ring (virtio 1.3 section 2.7), with a hostile driver. */
#include "ring.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_ring(data, size, false);
    return 0;
}
