/* A token bucket. Time is its user's: any clock in nanoseconds. No lock. */
#ifndef AV_BUCKET_H
#define AV_BUCKET_H

#include <stdint.h>

/* cdef begin */
/* `rate` tokens come a second, until there are `burst`. Who wants some may take them while there is
 * one at least, as many as it needs: what is more than there was is owed, and whoever comes next
 * waits until it is paid. So what is taken in any time is less than burst + rate * time and the
 * last taking. Exact: parts of a token are kept. Both at most AV_BUCKET_MAX. */
struct av_bucket {
    uint64_t rate;     /* 0: no limit, and nothing below holds */
    uint64_t burst;
    int64_t level;     /* tokens; below 0: owed */
    uint64_t fraction; /* of a token, in 1e-9 */
    uint64_t at_ns;    /* of this time is `level` */
};
/* Full at first. Later on it keeps what it has, as far as `burst` has room. */
void av_bucket_set(struct av_bucket *bucket, uint64_t rate, uint64_t burst, uint64_t now_ns);
/* Add what has come by now; nothing when that is earlier than the last time. */
void av_bucket_refill(struct av_bucket *bucket, uint64_t now_ns);
void av_bucket_take(struct av_bucket *bucket, uint64_t tokens);
/* How long after `at_ns` there will be `tokens`, at most `burst`. */
uint64_t av_bucket_wait_ns(const struct av_bucket *bucket, uint64_t tokens);
/* cdef end */

#define AV_BUCKET_MAX (UINT64_C(1) << 60)

#endif
