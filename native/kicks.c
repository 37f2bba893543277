#include "kicks.h"

void av_kicks_init(struct av_kicks *kicks, uint64_t now_ns, uint64_t free, uint64_t burst)
{
    *kicks = (struct av_kicks){ 0 };
    av_bucket_set(&kicks->bucket, free != 0 ? free : AV_KICKS_A_SECOND,
                  burst != 0 ? burst : AV_KICKS_BURST, now_ns);
}

void av_kicks_worked(struct av_kicks *kicks, uint64_t chains)
{
    struct av_bucket *bucket = &kicks->bucket;

    if (chains < bucket->burst)
        bucket->level += (int64_t)(chains * AV_KICKS_EARNED);
    if (chains >= bucket->burst || bucket->level >= (int64_t)bucket->burst) {
        bucket->level = (int64_t)bucket->burst;
        bucket->fraction = 0;
    }
}

uint64_t av_kicks_vain(struct av_kicks *kicks, uint64_t now_ns)
{
    kicks->vain++;
    av_bucket_refill(&kicks->bucket, now_ns);
    if (kicks->bucket.level > 0) {
        av_bucket_take(&kicks->bucket, 1);
        return 0;
    }
    kicks->deaf++;
    return AV_KICKS_DEAF_NS;
}
