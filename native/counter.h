/* Counters, and other words, that one thread changes and any thread may look at without a lock.
 *
 * A look gives each word as it was at some moment, and several words of different moments: that is
 * what statistics are for. The thread that changes one reads it plainly. */
#ifndef AV_COUNTER_H
#define AV_COUNTER_H

#include <stdint.h>

static inline void av_count(uint64_t *counter, uint64_t more)
{
    /* Not an atomic addition, which would lock the bus: nobody else adds. */
    __atomic_store_n(counter, *counter + more, __ATOMIC_RELAXED);
}

static inline uint64_t av_counted(const uint64_t *counter)
{
    return __atomic_load_n(counter, __ATOMIC_RELAXED);
}

#endif
