/* How a block request's I/O is done. An engine takes operations, starts them in batches, and
 * gives back their results; it knows neither guests nor rings. One thread uses it. */
#ifndef AV_BLK_ENGINE_H
#define AV_BLK_ENGINE_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "blk.h"
#include "gmem.h"

/* Valid until its result is given back. length: bytes; iov holds as many, of READ and WRITE. */
struct av_blk_op {
    enum av_blk_op_kind kind;
    uint64_t offset;
    uint64_t length;
    const struct iovec *iov;
    uint32_t iov_count;
    struct av_blk_op *next; /* the engine's */
    int64_t result;         /* bytes or -errno */
};

/* Operations in the order in which they came. */
struct av_blk_op_list {
    struct av_blk_op *first, *last;
};

static inline void av_blk_op_append(struct av_blk_op_list *list, struct av_blk_op *op)
{
    op->next = NULL;
    if (list->first == NULL) /* somebody without a lock may look whether there is one */
        __atomic_store_n(&list->first, op, __ATOMIC_RELAXED);
    else
        list->last->next = op;
    list->last = op;
}

static inline struct av_blk_op *av_blk_op_take_first(struct av_blk_op_list *list)
{
    struct av_blk_op *op = list->first;

    if (op != NULL)
        list->first = op->next;
    return op;
}

struct av_blk_engine;
typedef void av_blk_done(void *context, struct av_blk_op *op);

/* Give `op` and all after it to `done`, which may queue them again. */
static inline void av_blk_op_give_back(struct av_blk_op *op, av_blk_done *done, void *context)
{
    while (op != NULL) {
        struct av_blk_op *next = op->next;

        done(context, op);
        op = next;
    }
}

struct av_blk_engine_ops {
    void (*queue)(struct av_blk_engine *engine, struct av_blk_op *op);
    /* Start what is queued; what the host refuses to start is given back as failed. From here to
     * arm(), event_fd may stay silent. */
    void (*submit)(struct av_blk_engine *engine);
    /* Give finished operations to `done`. */
    void (*reap)(struct av_blk_engine *engine, av_blk_done *done, void *context);
    /* Whether reap() would find some, as far as memory tells. */
    bool (*ready)(struct av_blk_engine *engine);
    /* Signal event_fd when something finishes from now on; true when something already has. */
    bool (*arm)(struct av_blk_engine *engine);
    /* Keep this memory in place for transfers: the engine need not look it up for each. 0 or
     * -errno. NULL: of no use. It has to be undone before the memory goes; nothing in flight. */
    int (*pin)(struct av_blk_engine *engine, const struct av_gmem *mem);
    void (*unpin)(struct av_blk_engine *engine); /* nothing when it is not pinned */
    /* Let what has not begun fail, as far as the host does that; given back by reap(). It may
     * block. NULL: nothing that could hang. */
    void (*cancel)(struct av_blk_engine *engine);
    void (*destroy)(struct av_blk_engine *engine); /* nothing may be in flight */
};

struct av_blk_engine {
    const struct av_blk_engine_ops *ops;
    int event_fd; /* written when there is something to reap, or -1; nobody drains it */
};

/* depth: operations in flight at most; workers: threads. NULL: *error is the errno. */
struct av_blk_engine *av_blk_uring_create(int fd, uint32_t depth, bool may_hang, int *error);
struct av_blk_engine *av_blk_threads_create(int fd, uint32_t workers, int *error);
/* For somebody else to perform; see blk_loop.h. */
struct av_blk_engine *av_blk_loop_create(int *error);

#endif
