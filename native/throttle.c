#include "throttle.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "bucket.h"

#define SECOND_NS 1000000000u
/* Who has to wait waits for the tokens of a millisecond, if the burst is as large: a wake-up for
 * each request would cost more than most requests do. */
#define TURNS_A_SECOND 1000u

/* Taken with a home's lock held, and no other lock is taken then. */
struct av_limiter {
    pthread_mutex_t lock;
    atomic_bool limited; /* changed with the lock held */
    struct av_bucket bytes, ops;
    struct av_throttle *first, **end; /* those that wait */
    struct av_throttle *turn; /* waited until this run of its lane; NULL: none */
};

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * SECOND_NS + (uint64_t)now.tv_nsec;
}

static bool is_limited(const struct av_limiter *limiter)
{
    return atomic_load_explicit(&limiter->limited, memory_order_relaxed);
}

/* --- who waits, with the lock held ------------------------------------------------------- */

static uint64_t due_ns(const struct av_bucket *bucket)
{
    uint64_t tokens = bucket->rate / TURNS_A_SECOND;

    if (tokens > bucket->burst)
        tokens = bucket->burst;
    return bucket->at_ns + av_bucket_wait_ns(bucket, tokens == 0 ? 1 : tokens);
}

static void set_timer(struct av_throttle *throttle, uint64_t at_ns)
{
    struct itimerspec at = { .it_value.tv_sec = (time_t)(at_ns / SECOND_NS),
                             .it_value.tv_nsec = (long)(at_ns % SECOND_NS) };

    throttle->due_ns = at_ns;
    if (timerfd_settime(throttle->timer_fd, TFD_TIMER_ABSTIME, &at, NULL) < 0)
        abort(); /* it can fail for a bad time or descriptor only, and the lane would hang */
}

/* Let the first know when it has its turn. */
static void arm_first(struct av_limiter *limiter)
{
    uint64_t bytes_ns, ops_ns;

    if (limiter->first == NULL || limiter->turn != NULL)
        return;
    bytes_ns = due_ns(&limiter->bytes);
    ops_ns = due_ns(&limiter->ops);
    set_timer(limiter->first, bytes_ns > ops_ns ? bytes_ns : ops_ns);
}

static void append(struct av_limiter *limiter, struct av_throttle *throttle)
{
    throttle->waiting = true;
    throttle->waits++;
    throttle->due_ns = UINT64_MAX;
    throttle->next = NULL;
    *limiter->end = throttle;
    limiter->end = &throttle->next;
    if (limiter->turn == throttle)
        limiter->turn = NULL;
    else if (limiter->first != throttle)
        return;
    arm_first(limiter);
}

static void take_out(struct av_limiter *limiter, struct av_throttle *throttle)
{
    struct av_throttle **link = &limiter->first;

    while (*link != throttle)
        link = &(*link)->next;
    *link = throttle->next;
    if (limiter->end == &throttle->next)
        limiter->end = link;
    throttle->waiting = false;
}

/* --- the limiter ------------------------------------------------------------------------- */

struct av_limiter *av_limiter_create(void)
{
    struct av_limiter *limiter = calloc(1, sizeof(*limiter));

    if (limiter == NULL)
        return NULL;
    pthread_mutex_init(&limiter->lock, NULL);
    limiter->end = &limiter->first;
    return limiter;
}

void av_limiter_destroy(struct av_limiter *limiter)
{
    if (limiter == NULL)
        return;
    pthread_mutex_destroy(&limiter->lock);
    free(limiter);
}

void av_limiter_set(struct av_limiter *limiter, const struct av_rates *rates)
{
    uint64_t now = now_ns();

    pthread_mutex_lock(&limiter->lock);
    av_bucket_set(&limiter->bytes, rates->bytes, rates->bytes_burst, now);
    av_bucket_set(&limiter->ops, rates->ops, rates->ops_burst, now);
    atomic_store(&limiter->limited, rates->bytes != 0 || rates->ops != 0);
    for (struct av_throttle *waiter = limiter->first; waiter != NULL; waiter = waiter->next) {
        waiter->due_ns = UINT64_MAX;
        if (!is_limited(limiter))
            set_timer(waiter, 1);
    }
    if (is_limited(limiter))
        arm_first(limiter);
    else
        limiter->turn = NULL;
    pthread_mutex_unlock(&limiter->lock);
}

/* --- a lane's place ---------------------------------------------------------------------- */

void av_throttle_init(struct av_throttle *throttle)
{
    *throttle = (struct av_throttle){ .timer_fd = -1 };
}

void av_throttle_fini(struct av_throttle *throttle)
{
    av_throttle_leave(throttle);
    if (throttle->timer_fd >= 0)
        close(throttle->timer_fd);
}

int av_throttle_attach(struct av_throttle *throttle, struct av_lane *lane,
                       struct av_limiter *limiter)
{
    int fd, result;

    if (throttle->limiter != NULL)
        return 0;
    fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    if (fd < 0)
        return -errno;
    result = av_lane_watch(lane, fd);
    if (result < 0) {
        close(fd);
        return result;
    }
    throttle->timer_fd = fd;
    throttle->limiter = limiter;
    return 0;
}

void av_throttle_begin_limited(struct av_throttle *throttle)
{
    struct av_limiter *limiter = throttle->limiter;
    uint64_t now;

    if (!is_limited(limiter) && !throttle->waiting)
        return;
    now = now_ns();
    pthread_mutex_lock(&limiter->lock);
    av_bucket_refill(&limiter->bytes, now);
    av_bucket_refill(&limiter->ops, now);
    if (throttle->waiting && !is_limited(limiter)) {
        take_out(limiter, throttle);
    } else if (limiter->first == throttle && now >= throttle->due_ns) {
        take_out(limiter, throttle);
        limiter->turn = throttle;
    }
    pthread_mutex_unlock(&limiter->lock);
}

static bool has_tokens(const struct av_bucket *bucket)
{
    return bucket->rate == 0 || bucket->level > 0;
}

bool av_throttle_admits_limited(struct av_throttle *throttle, const struct av_vring *ring)
{
    struct av_limiter *limiter = throttle->limiter;
    bool admitted;

    if (throttle->waiting)
        return false;
    if (!is_limited(limiter))
        return true;
    pthread_mutex_lock(&limiter->lock);
    admitted = has_tokens(&limiter->bytes) && has_tokens(&limiter->ops) &&
               (limiter->first == NULL || limiter->turn == throttle);
    /* It may have been switched off since, and then nobody would come to wake us. */
    admitted |= !is_limited(limiter);
    if (!admitted && (ring == NULL || av_vring_pending(ring)))
        append(limiter, throttle);
    pthread_mutex_unlock(&limiter->lock);
    return admitted;
}

void av_throttle_charge_limited(struct av_throttle *throttle, uint64_t ops, uint64_t bytes)
{
    struct av_limiter *limiter = throttle->limiter;

    if (!is_limited(limiter))
        return;
    pthread_mutex_lock(&limiter->lock);
    if (limiter->bytes.rate != 0)
        av_bucket_take(&limiter->bytes, bytes);
    if (limiter->ops.rate != 0)
        av_bucket_take(&limiter->ops, ops);
    pthread_mutex_unlock(&limiter->lock);
}

void av_throttle_end_limited(struct av_throttle *throttle)
{
    struct av_limiter *limiter = throttle->limiter;

    if (!is_limited(limiter))
        return;
    pthread_mutex_lock(&limiter->lock);
    if (limiter->turn == throttle) {
        limiter->turn = NULL;
        arm_first(limiter);
    }
    pthread_mutex_unlock(&limiter->lock);
}

void av_throttle_leave_limited(struct av_throttle *throttle)
{
    struct av_limiter *limiter = throttle->limiter;

    if (!throttle->waiting)
        return;
    pthread_mutex_lock(&limiter->lock);
    take_out(limiter, throttle);
    arm_first(limiter);
    pthread_mutex_unlock(&limiter->lock);
}
