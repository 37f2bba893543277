#include "bucket.h"

#define SECOND_NS 1000000000u
#define OWED_MAX (INT64_C(1) << 61)
#define WAIT_MAX_S (UINT64_C(1) << 30)

void av_bucket_set(struct av_bucket *bucket, uint64_t rate, uint64_t burst, uint64_t now_ns)
{
    if (bucket->rate == 0)
        *bucket = (struct av_bucket){ .level = (int64_t)burst, .at_ns = now_ns };
    else
        av_bucket_refill(bucket, now_ns);
    if (bucket->level >= (int64_t)burst) {
        bucket->level = (int64_t)burst;
        bucket->fraction = 0;
    }
    bucket->rate = rate;
    bucket->burst = burst;
}

void av_bucket_refill(struct av_bucket *bucket, uint64_t now_ns)
{
    uint64_t seconds, ns, missing, parts, gained;

    if (bucket->rate == 0 || now_ns <= bucket->at_ns)
        return;
    seconds = (now_ns - bucket->at_ns) / SECOND_NS;
    ns = (now_ns - bucket->at_ns) % SECOND_NS;
    missing = bucket->burst - (uint64_t)bucket->level;
    bucket->at_ns = now_ns;
    gained = missing;
    if (seconds <= missing / bucket->rate) {
        /* The rate in two parts, so that no product needs more than 64 bits. */
        parts = ns * (bucket->rate % SECOND_NS) + bucket->fraction;
        gained = seconds * bucket->rate + ns * (bucket->rate / SECOND_NS) + parts / SECOND_NS;
        bucket->fraction = parts % SECOND_NS;
    }
    if (gained >= missing) {
        gained = missing;
        bucket->fraction = 0;
    }
    bucket->level += (int64_t)gained;
}

void av_bucket_take(struct av_bucket *bucket, uint64_t tokens)
{
    if (tokens >= (uint64_t)(bucket->level + OWED_MAX))
        bucket->level = -OWED_MAX;
    else
        bucket->level -= (int64_t)tokens;
}

uint64_t av_bucket_wait_ns(const struct av_bucket *bucket, uint64_t tokens)
{
    uint64_t rate = bucket->rate, fraction = bucket->fraction, lacking, seconds, rest, ns;

    if (rate == 0 || bucket->level >= (int64_t)tokens)
        return 0;
    lacking = tokens - (uint64_t)bucket->level;
    seconds = lacking / rate;
    rest = lacking % rate;
    if (rest == 0 && fraction != 0) {
        seconds--;
        rest = rate;
    }
    if (seconds >= WAIT_MAX_S)
        return WAIT_MAX_S * SECOND_NS;
    /* Of numbers too large for the product the last bits do not matter: who comes a little too
     * early waits again. */
    for (; rest > UINT64_MAX / SECOND_NS; rest >>= 1, rate >>= 1)
        fraction >>= 1;
    ns = rest * SECOND_NS - fraction;
    return seconds * SECOND_NS + ns / rate + (ns % rate != 0);
}
