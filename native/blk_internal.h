/* What blk.c (queues and turns) and blk_perform.c (the life of a request) share. */
#ifndef AV_BLK_INTERNAL_H
#define AV_BLK_INTERNAL_H

#include <stdbool.h>
#include <stdint.h>

#include "blk.h"
#include "blk_engine.h"
#include "blk_req.h"
#include "hold.h"
#include "lane.h"
#include "throttle.h"

/* A request in flight. What every transfer uses comes first, and fits into few cache lines. */
struct av_blk_slot {
    struct av_blk_op op; /* first: the engine gives it back */
    struct av_blk_req req;
    struct iovec *iov;
    struct av_blk_slot *next_free;
    uint8_t *bounce;
    uint32_t done; /* bytes of data moved */
    uint32_t copied_bytes; /* at a time, until it is finished; 0: none */
    uint32_t cut_bytes;    /* kept from the last segment of the operation under way */
    uint32_t tries; /* of the operation under way, in vain */
    uint16_t head;
    uint32_t range;  /* of a discard or write-zeroes: which one is under way */
    uint64_t zeroed; /* bytes of it that were written as zeroes */
    struct iovec bounce_iov;
    struct iovec zero_iov;
};

struct av_blk {
    struct av_lane lane; /* first: its home gives it back */
    struct av_blk_config config;
    struct av_blk_limits limits;
    struct av_vring *ring;
    struct av_blk_engine *engine;
    uint32_t iov_max;
    uint32_t in_flight;
    uint64_t copied_bytes; /* of those in flight together */
    uint32_t queued;   /* operations handed to the engine since its last submit */
    uint32_t finished; /* requests since the driver's last interrupt was due */
    struct av_hold hold;
    struct av_throttle throttle;
    int timer_fd;      /* for the end of a hold */
    struct av_blk_slot *slots;
    struct av_blk_slot *free;
    struct iovec *iovs;
    struct av_blk_range *ranges;
    struct av_blk_stats stats;
};

/* Begin a parsed request; it may be finished when this returns. */
void av_blk_perform(struct av_blk *blk, struct av_blk_slot *slot);
/* Answer a request and free its slot. */
void av_blk_finish(struct av_blk *blk, struct av_blk_slot *slot, uint8_t status);
/* An av_blk_done: go on with the request whose operation the engine has finished. */
void av_blk_op_done(void *context, struct av_blk_op *op);

#endif
