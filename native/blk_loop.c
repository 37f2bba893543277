#include "blk_loop.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "blk_internal.h"

/* All of it with the home's lock held. */
struct loop_engine {
    struct av_blk_engine base;
    struct av_blk_op_list queued;
    struct av_blk_op_list submitted; /* to be taken */
    struct av_blk_op_list finished;
};

static struct loop_engine *of(struct av_blk_engine *engine)
{
    return (struct loop_engine *)engine;
}

static struct av_blk_op *named(uint64_t op)
{
    return (struct av_blk_op *)(uintptr_t)op;
}

int av_blk_loop_take(struct av_blk *blk, struct av_blk_loop_op *out, int max)
{
    struct loop_engine *engine = of(blk->engine);
    struct av_blk_op *op;
    int count = 0;

    av_lane_lock(&blk->lane);
    while (count < max && (op = av_blk_op_take_first(&engine->submitted)) != NULL) {
        bool data = op->kind == AV_BLK_OP_READ || op->kind == AV_BLK_OP_WRITE;

        out[count++] = (struct av_blk_loop_op){
            .op = (uintptr_t)op,
            .offset = op->offset,
            .length = op->length,
            .base = data && op->iov_count == 1 ? (uintptr_t)op->iov->iov_base : 0,
            .kind = op->kind,
            .iov_count = data ? op->iov_count : 0,
        };
    }
    av_lane_unlock(&blk->lane);
    return count;
}

const struct iovec *av_blk_loop_segments(uint64_t op)
{
    return named(op)->iov;
}

void av_blk_loop_scatter(uint64_t op, const uint8_t *from, uint64_t bytes)
{
    const struct iovec *iov = named(op)->iov;

    for (; bytes != 0; iov++) {
        memcpy(iov->iov_base, from, iov->iov_len);
        from += iov->iov_len;
        bytes -= iov->iov_len;
    }
}

void av_blk_loop_gather(uint64_t op, uint8_t *to, uint64_t bytes)
{
    const struct iovec *iov = named(op)->iov;

    for (; bytes != 0; iov++) {
        memcpy(to, iov->iov_base, iov->iov_len);
        to += iov->iov_len;
        bytes -= iov->iov_len;
    }
}

void av_blk_loop_finish(struct av_blk *blk, uint64_t op, int64_t result)
{
    struct loop_engine *engine = of(blk->engine);

    av_lane_lock(&blk->lane);
    named(op)->result = result;
    /* Who comes after the first of a batch finds its lane woken. */
    if (engine->finished.first == NULL)
        av_lane_wake(&blk->lane);
    av_blk_op_append(&engine->finished, named(op));
    av_lane_unlock(&blk->lane);
}

static void loop_queue(struct av_blk_engine *engine, struct av_blk_op *op)
{
    av_blk_op_append(&of(engine)->queued, op);
}

static void loop_submit(struct av_blk_engine *base)
{
    struct loop_engine *engine = of(base);
    struct av_blk_op *op;

    while ((op = av_blk_op_take_first(&engine->queued)) != NULL)
        av_blk_op_append(&engine->submitted, op);
}

static void loop_reap(struct av_blk_engine *base, av_blk_done *done, void *context)
{
    struct av_blk_op *op = of(base)->finished.first;

    of(base)->finished.first = NULL;
    av_blk_op_give_back(op, done, context);
}

static bool loop_ready(struct av_blk_engine *base)
{
    return of(base)->finished.first != NULL;
}

static void loop_destroy(struct av_blk_engine *engine)
{
    free(engine);
}

static const struct av_blk_engine_ops loop_ops = {
    .queue = loop_queue,
    .submit = loop_submit,
    .reap = loop_reap,
    .ready = loop_ready,
    .arm = loop_ready,
    .destroy = loop_destroy,
};

struct av_blk_engine *av_blk_loop_create(int *error)
{
    struct loop_engine *engine = calloc(1, sizeof(*engine));

    if (engine == NULL) {
        *error = ENOMEM;
        return NULL;
    }
    engine->base.ops = &loop_ops;
    engine->base.event_fd = -1;
    return &engine->base;
}
