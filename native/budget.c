#include "budget.h"

#include <pthread.h>
#include <stdlib.h>

#include "bucket.h"

/* Nanoseconds a second: a token of the bucket is a nanosecond that may be spent. */
#define RATE_OF_PPM 1000u

struct av_budget {
    pthread_mutex_t lock;
    struct av_bucket bucket;
};

struct av_budget *av_budget_create(uint32_t share_ppm, uint64_t burst_ns, uint64_t now_ns)
{
    struct av_budget *budget = calloc(1, sizeof(*budget));

    if (budget == NULL)
        return NULL;
    pthread_mutex_init(&budget->lock, NULL);
    av_bucket_set(&budget->bucket, (uint64_t)share_ppm * RATE_OF_PPM, burst_ns, now_ns);
    return budget;
}

void av_budget_destroy(struct av_budget *budget)
{
    if (budget == NULL)
        return;
    pthread_mutex_destroy(&budget->lock);
    free(budget);
}

void av_budget_spend(struct av_budget *budget, uint64_t spent_ns, uint64_t now_ns)
{
    struct av_bucket *bucket = &budget->bucket;
    uint64_t most;

    pthread_mutex_lock(&budget->lock);
    av_bucket_refill(bucket, now_ns);
    most = (uint64_t)(bucket->level + (int64_t)AV_BUDGET_OWED_MAX_NS);
    av_bucket_take(bucket, spent_ns < most ? spent_ns : most);
    pthread_mutex_unlock(&budget->lock);
}

uint64_t av_budget_wait_ns(struct av_budget *budget, uint64_t now_ns)
{
    struct av_bucket *bucket = &budget->bucket;
    uint64_t turn_ns, wait_ns = 0;

    pthread_mutex_lock(&budget->lock);
    av_bucket_refill(bucket, now_ns);
    turn_ns = bucket->burst < AV_BUDGET_TURN_NS ? bucket->burst : AV_BUDGET_TURN_NS;
    if (bucket->level <= 0)
        wait_ns = av_bucket_wait_ns(bucket, turn_ns);
    pthread_mutex_unlock(&budget->lock);
    return wait_ns;
}
