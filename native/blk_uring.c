/* The io_uring engine: one ring a device, the file registered, completions by eventfd. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "blk_engine.h"

#define SUBMIT_TRIES 1000

struct uring_engine {
    struct av_blk_engine base;
    struct io_uring ring;
};

static struct uring_engine *of(struct av_blk_engine *engine)
{
    return (struct uring_engine *)engine;
}

static void uring_queue(struct av_blk_engine *engine, struct av_blk_op *op)
{
    /* The ring has an entry for each operation that may be in flight, so there is one. */
    struct io_uring_sqe *sqe = io_uring_get_sqe(&of(engine)->ring);

    switch (op->kind) {
    case AV_BLK_OP_READ:
        if (op->iov_count == 1)
            io_uring_prep_read(sqe, 0, op->iov->iov_base, (unsigned)op->iov->iov_len, op->offset);
        else
            io_uring_prep_readv(sqe, 0, op->iov, op->iov_count, op->offset);
        break;
    case AV_BLK_OP_WRITE:
        if (op->iov_count == 1)
            io_uring_prep_write(sqe, 0, op->iov->iov_base, (unsigned)op->iov->iov_len, op->offset);
        else
            io_uring_prep_writev(sqe, 0, op->iov, op->iov_count, op->offset);
        break;
    case AV_BLK_OP_SYNC:
        io_uring_prep_fsync(sqe, 0, IORING_FSYNC_DATASYNC);
        break;
    case AV_BLK_OP_PUNCH:
        io_uring_prep_fallocate(sqe, 0, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                                (off_t)op->offset, (off_t)op->length);
        break;
    case AV_BLK_OP_ZERO:
        io_uring_prep_fallocate(sqe, 0, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE,
                                (off_t)op->offset, (off_t)op->length);
        break;
    }
    sqe->flags |= IOSQE_FIXED_FILE;
    io_uring_sqe_set_data(sqe, op);
}

static int uring_submit(struct av_blk_engine *engine)
{
    struct io_uring *ring = &of(engine)->ring;
    int result, patience = SUBMIT_TRIES;

    /* What completes within the call (a read from the page cache does), or while there is other
     * work, is reaped without a wake-up. */
    io_uring_cq_eventfd_toggle(ring, false);
    /* EAGAIN and EBUSY: the kernel is short of memory for a moment; what was not taken stays. */
    do {
        result = io_uring_submit(ring);
        if ((result == -EAGAIN || result == -EBUSY) && --patience != 0)
            sched_yield();
    } while (patience != 0 && (result == -EINTR || result == -EAGAIN || result == -EBUSY ||
                               (result > 0 && io_uring_sq_ready(ring) != 0)));
    return result < 0 ? result : 0;
}

static void uring_reap(struct av_blk_engine *engine, av_blk_done *done, void *context)
{
    struct io_uring *ring = &of(engine)->ring;
    struct io_uring_cqe *cqe;
    unsigned head, count = 0;

    io_uring_for_each_cqe(ring, head, cqe) {
        struct av_blk_op *op = io_uring_cqe_get_data(cqe);
        op->result = cqe->res;
        done(context, op);
        count++;
    }
    io_uring_cq_advance(ring, count);
}

static bool uring_ready(struct av_blk_engine *engine)
{
    return io_uring_cq_ready(&of(engine)->ring) != 0;
}

static bool uring_arm(struct av_blk_engine *engine)
{
    io_uring_cq_eventfd_toggle(&of(engine)->ring, true);
    /* Full: our store of the flag against the load of the ring's tail. It pairs with the kernel's
     * barrier between moving the tail and reading the flag. Without it a completion between the
     * two would wake nobody. */
    atomic_thread_fence(memory_order_seq_cst);
    return uring_ready(engine);
}

static void uring_destroy(struct av_blk_engine *engine)
{
    /* The kernel frees a ring some time after its exit, and the file with it: an unmount right
     * after the VM would find it busy. */
    io_uring_unregister_files(&of(engine)->ring);
    io_uring_queue_exit(&of(engine)->ring);
    close(engine->event_fd);
    free(engine);
}

static const struct av_blk_engine_ops uring_ops = {
    .queue = uring_queue,
    .submit = uring_submit,
    .reap = uring_reap,
    .ready = uring_ready,
    .arm = uring_arm,
    .destroy = uring_destroy,
};

static int ring_init(struct io_uring *ring, uint32_t depth)
{
    /* Completions are looked at when the loop comes around, so an interrupt of its thread for
     * each is wasted; kernels before 5.19 do not know the flag. */
    int result = io_uring_queue_init(depth, ring, IORING_SETUP_COOP_TASKRUN);

    return result == -EINVAL ? io_uring_queue_init(depth, ring, 0) : result;
}

struct av_blk_engine *av_blk_uring_create(int fd, uint32_t depth, int *error)
{
    struct uring_engine *engine = calloc(1, sizeof(*engine));
    int result;

    if (engine == NULL) {
        *error = ENOMEM;
        return NULL;
    }
    engine->base.ops = &uring_ops;
    engine->base.event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (engine->base.event_fd < 0) {
        *error = errno;
        free(engine);
        return NULL;
    }
    result = ring_init(&engine->ring, depth);
    if (result < 0) {
        *error = -result;
        close(engine->base.event_fd);
        free(engine);
        return NULL;
    }
    result = io_uring_register_files(&engine->ring, &fd, 1);
    if (result == 0)
        result = io_uring_register_eventfd(&engine->ring, engine->base.event_fd);
    if (result < 0) {
        *error = -result;
        uring_destroy(&engine->base);
        return NULL;
    }
    return &engine->base;
}
