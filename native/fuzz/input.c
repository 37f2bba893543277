#include <string.h>

#include "fuzz.h"

void fuzz_bytes(struct fuzz_input *in, void *to, size_t count)
{
    size_t piece = count < in->left ? count : in->left;

    if (piece != 0)
        memcpy(to, in->at, piece);
    if (piece != count)
        memset((uint8_t *)to + piece, 0, count - piece);
    in->at += piece;
    in->left -= piece;
}

uint8_t fuzz_u8(struct fuzz_input *in)
{
    uint8_t value;

    fuzz_bytes(in, &value, sizeof(value));
    return value;
}

uint16_t fuzz_u16(struct fuzz_input *in)
{
    uint16_t value;

    fuzz_bytes(in, &value, sizeof(value));
    return value;
}

uint32_t fuzz_u32(struct fuzz_input *in)
{
    uint32_t value;

    fuzz_bytes(in, &value, sizeof(value));
    return value;
}

uint64_t fuzz_u64(struct fuzz_input *in)
{
    uint64_t value;

    fuzz_bytes(in, &value, sizeof(value));
    return value;
}

uint32_t fuzz_below(struct fuzz_input *in, uint32_t count)
{
    return fuzz_u8(in) % count;
}

uint64_t fuzz_number(struct fuzz_input *in)
{
    uint8_t how = fuzz_u8(in);

    switch (how >> 6) {
    case 0:
        return how & 63;
    case 1:
        return fuzz_u16(in);
    case 2: /* around a power of two */
        return (1ull << (how & 63)) + (uint64_t)(int64_t)(int8_t)fuzz_u8(in);
    default:
        return fuzz_u64(in);
    }
}
