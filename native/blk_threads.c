/* The engine for hosts that refuse io_uring: a few threads and ordinary system calls. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "blk.h"
#include "blk_engine.h"
#include "walls.h"

struct threads_engine {
    struct av_blk_engine base;
    int fd;
    pthread_mutex_t lock;
    pthread_cond_t work;
    struct av_blk_op_list queued; /* the caller's until submit() */
    struct av_blk_op_list waiting;
    struct av_blk_op_list finished;
    bool armed;    /* somebody waits for event_fd */
    bool stopping;
    uint32_t workers;
    pthread_t worker[AV_BLK_WORKERS_MAX];
};

static struct threads_engine *of(struct av_blk_engine *engine)
{
    return (struct threads_engine *)engine;
}

static int64_t perform(int fd, const struct av_blk_op *op)
{
    int punch = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    int zero = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE;
    ssize_t result = -1;

    switch (op->kind) {
    case AV_BLK_OP_READ:
        result = preadv(fd, op->iov, (int)op->iov_count, (off_t)op->offset);
        break;
    case AV_BLK_OP_WRITE:
        result = pwritev(fd, op->iov, (int)op->iov_count, (off_t)op->offset);
        break;
    case AV_BLK_OP_SYNC:
        result = fdatasync(fd);
        break;
    case AV_BLK_OP_PUNCH:
        result = fallocate(fd, punch, (off_t)op->offset, (off_t)op->length);
        break;
    case AV_BLK_OP_ZERO:
        result = fallocate(fd, zero, (off_t)op->offset, (off_t)op->length);
        break;
    }
    return result < 0 ? -errno : result;
}

static void *work(void *argument)
{
    struct threads_engine *engine = argument;
    uint64_t one = 1;

    av_walls_thread(AV_ROLE_IO);
    pthread_mutex_lock(&engine->lock);
    for (;;) {
        struct av_blk_op *op;

        while (engine->waiting.first == NULL && !engine->stopping)
            pthread_cond_wait(&engine->work, &engine->lock);
        op = av_blk_op_take_first(&engine->waiting);
        if (op == NULL)
            break;
        pthread_mutex_unlock(&engine->lock);
        op->result = perform(engine->fd, op);
        pthread_mutex_lock(&engine->lock);
        /* Only the first of a batch wakes whoever waits; it takes the whole list. */
        if (engine->armed && engine->finished.first == NULL &&
            write(engine->base.event_fd, &one, sizeof(one)) < 0)
            abort(); /* an eventfd of our own refuses only after 2^64 batches */
        av_blk_op_append(&engine->finished, op);
    }
    pthread_mutex_unlock(&engine->lock);
    return NULL;
}

static void threads_queue(struct av_blk_engine *engine, struct av_blk_op *op)
{
    av_blk_op_append(&of(engine)->queued, op);
}

static void threads_submit(struct av_blk_engine *base)
{
    struct threads_engine *engine = of(base);
    struct av_blk_op *op;

    pthread_mutex_lock(&engine->lock);
    engine->armed = false;
    while ((op = av_blk_op_take_first(&engine->queued)) != NULL) {
        av_blk_op_append(&engine->waiting, op);
        pthread_cond_signal(&engine->work);
    }
    pthread_mutex_unlock(&engine->lock);
}

static void threads_reap(struct av_blk_engine *base, av_blk_done *done, void *context)
{
    struct threads_engine *engine = of(base);
    struct av_blk_op *op;

    pthread_mutex_lock(&engine->lock);
    op = engine->finished.first;
    __atomic_store_n(&engine->finished.first, NULL, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&engine->lock);
    av_blk_op_give_back(op, done, context);
}

static bool threads_ready(struct av_blk_engine *base)
{
    return __atomic_load_n(&of(base)->finished.first, __ATOMIC_RELAXED) != NULL;
}

static bool threads_arm(struct av_blk_engine *base)
{
    struct threads_engine *engine = of(base);
    bool ready;

    /* Whoever finishes first after this finds the list empty, and writes event_fd. */
    pthread_mutex_lock(&engine->lock);
    engine->armed = true;
    ready = engine->finished.first != NULL;
    pthread_mutex_unlock(&engine->lock);
    return ready;
}

static void threads_cancel(struct av_blk_engine *base)
{
    struct threads_engine *engine = of(base);
    struct av_blk_op *op;

    pthread_mutex_lock(&engine->lock);
    while ((op = av_blk_op_take_first(&engine->queued)) != NULL ||
           (op = av_blk_op_take_first(&engine->waiting)) != NULL) {
        op->result = -ECANCELED;
        av_blk_op_append(&engine->finished, op);
    }
    pthread_mutex_unlock(&engine->lock);
}

static void threads_destroy(struct av_blk_engine *base)
{
    struct threads_engine *engine = of(base);

    pthread_mutex_lock(&engine->lock);
    engine->stopping = true;
    pthread_cond_broadcast(&engine->work);
    pthread_mutex_unlock(&engine->lock);
    for (uint32_t i = 0; i < engine->workers; i++)
        pthread_join(engine->worker[i], NULL);
    pthread_cond_destroy(&engine->work);
    pthread_mutex_destroy(&engine->lock);
    close(base->event_fd);
    free(engine);
}

static const struct av_blk_engine_ops threads_ops = {
    .queue = threads_queue,
    .submit = threads_submit,
    .reap = threads_reap,
    .ready = threads_ready,
    .arm = threads_arm,
    .cancel = threads_cancel,
    .destroy = threads_destroy,
};

/* Workers take no signals: those are for the program's own threads. */
static int start_workers(struct threads_engine *engine, uint32_t workers)
{
    sigset_t all, before;
    int result = 0;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (result == 0 && engine->workers < workers) {
        result = pthread_create(&engine->worker[engine->workers], NULL, work, engine);
        if (result == 0)
            engine->workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return result;
}

struct av_blk_engine *av_blk_threads_create(int fd, uint32_t workers, int *error)
{
    struct threads_engine *engine = calloc(1, sizeof(*engine));

    if (engine == NULL) {
        *error = ENOMEM;
        return NULL;
    }
    engine->base.ops = &threads_ops;
    engine->fd = fd;
    engine->base.event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (engine->base.event_fd < 0) {
        *error = errno;
        free(engine);
        return NULL;
    }
    pthread_mutex_init(&engine->lock, NULL);
    pthread_cond_init(&engine->work, NULL);
    *error = start_workers(engine, workers);
    if (*error != 0) {
        threads_destroy(&engine->base);
        return NULL;
    }
    return &engine->base;
}
