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
#include <sys/syscall.h>
#include <unistd.h>

#include "blk_engine.h"
#include "walls.h"

#define SUBMIT_TRIES 1000
#define COPY_MAX_BYTES (1u << 20)
#define PINNED_MAX_BYTES (1ull << 30) /* the kernel's limit of a registered buffer */

struct uring_engine {
    struct av_blk_engine base;
    struct io_uring ring;
    bool may_hang;             /* starting an operation may wait for the storage */
    struct av_blk_op *refused; /* not started, and not given back yet */
    struct iovec *pinned;      /* memory that is registered, NULL: none */
    uint32_t pinned_count;
};

static struct uring_engine *of(struct av_blk_engine *engine)
{
    return (struct uring_engine *)engine;
}

/* Which registered buffer holds a transfer's memory as a whole; -1: none. */
static int pinned_at(const struct uring_engine *engine, const struct av_blk_op *op)
{
    uintptr_t at = (uintptr_t)op->iov->iov_base;

    if (op->iov_count != 1)
        return -1;
    for (uint32_t i = 0; i < engine->pinned_count; i++) {
        uintptr_t begin = (uintptr_t)engine->pinned[i].iov_base;

        if (at >= begin && at - begin < engine->pinned[i].iov_len)
            return op->iov->iov_len <= engine->pinned[i].iov_len - (at - begin) ? (int)i : -1;
    }
    return -1;
}

static void prepare_transfer(struct uring_engine *engine, struct io_uring_sqe *sqe,
                             const struct av_blk_op *op)
{
    unsigned length = (unsigned)op->iov->iov_len;
    void *at = op->iov->iov_base;
    int buffer = pinned_at(engine, op);

    if (op->kind == AV_BLK_OP_READ) {
        if (buffer >= 0)
            io_uring_prep_read_fixed(sqe, 0, at, length, op->offset, buffer);
        else if (op->iov_count == 1)
            io_uring_prep_read(sqe, 0, at, length, op->offset);
        else
            io_uring_prep_readv(sqe, 0, op->iov, op->iov_count, op->offset);
        return;
    }
    if (buffer >= 0)
        io_uring_prep_write_fixed(sqe, 0, at, length, op->offset, buffer);
    else if (op->iov_count == 1)
        io_uring_prep_write(sqe, 0, at, length, op->offset);
    else
        io_uring_prep_writev(sqe, 0, op->iov, op->iov_count, op->offset);
}

static void uring_queue(struct av_blk_engine *engine, struct av_blk_op *op)
{
    /* The ring has an entry for each operation that may be in flight, so there is one. */
    struct io_uring_sqe *sqe = io_uring_get_sqe(&of(engine)->ring);

    switch (op->kind) {
    case AV_BLK_OP_READ:
    case AV_BLK_OP_WRITE:
        prepare_transfer(of(engine), sqe, op);
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
    /* A copy of so much from the page cache would hold up the thread that submits. */
    if (op->length > COPY_MAX_BYTES || of(engine)->may_hang)
        sqe->flags |= IOSQE_ASYNC;
    io_uring_sqe_set_data(sqe, op);
}

/* Take back what the kernel did not take, the newest entries of the ring; it looks at them only
 * within io_uring_enter(). */
static void take_back(struct uring_engine *engine, int error)
{
    struct io_uring_sq *sq = &engine->ring.sq;
    unsigned left = io_uring_sq_ready(&engine->ring);
    unsigned mask = *sq->kring_mask;

    sq->sqe_tail -= left;
    for (unsigned i = 0; i < left; i++) {
        struct io_uring_sqe *sqe = &sq->sqes[(sq->sqe_tail + i) & mask];
        struct av_blk_op *op = (struct av_blk_op *)(uintptr_t)sqe->user_data;

        op->result = error;
        op->next = engine->refused;
        engine->refused = op;
    }
    sq->sqe_head = sq->sqe_tail;
    io_uring_smp_store_release(sq->ktail, sq->sqe_tail);
}

static void uring_submit(struct av_blk_engine *base)
{
    struct uring_engine *engine = of(base);
    struct io_uring *ring = &engine->ring;
    int result, patience = SUBMIT_TRIES;

    /* What completes within the call, or while there is other work, is reaped without a
     * wake-up. */
    io_uring_cq_eventfd_toggle(ring, false);
    /* EAGAIN and EBUSY: the kernel is short of memory for a moment; what was not taken stays. */
    do {
        result = io_uring_submit(ring);
        if (result == -EAGAIN || result == -EBUSY)
            sched_yield();
    } while (--patience != 0 && (result == -EINTR || result == -EAGAIN || result == -EBUSY ||
                                 (result > 0 && io_uring_sq_ready(ring) != 0)));
    /* Not EAGAIN: the requests are not to be tried once more. */
    if (io_uring_sq_ready(ring) != 0)
        take_back(engine, -ECANCELED);
}

/* Completions that wait for their thread to enter the kernel. */
static bool work_waits(const struct io_uring *ring)
{
    return (__atomic_load_n(ring->sq.kflags, __ATOMIC_RELAXED) & IORING_SQ_TASKRUN) != 0;
}

static void uring_reap(struct av_blk_engine *base, av_blk_done *done, void *context)
{
    struct uring_engine *engine = of(base);
    struct io_uring *ring = &engine->ring;
    struct io_uring_cqe *cqe;
    unsigned head, count = 0;

    while (engine->refused != NULL) {
        struct av_blk_op *op = engine->refused;

        engine->refused = op->next;
        done(context, op);
    }
    if (work_waits(ring))
        io_uring_get_events(ring);
    io_uring_for_each_cqe(ring, head, cqe) {
        struct av_blk_op *op = io_uring_cqe_get_data(cqe);
        op->result = cqe->res;
        done(context, op);
        count++;
    }
    io_uring_cq_advance(ring, count);
}

static bool uring_ready(struct av_blk_engine *base)
{
    struct uring_engine *engine = of(base);

    return engine->refused != NULL || io_uring_cq_ready(&engine->ring) != 0 ||
           work_waits(&engine->ring);
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

static void uring_unpin(struct av_blk_engine *base)
{
    struct uring_engine *engine = of(base);

    if (engine->pinned == NULL)
        return;
    io_uring_unregister_buffers(&engine->ring);
    free(engine->pinned);
    engine->pinned = NULL;
    engine->pinned_count = 0;
}

static int uring_pin(struct av_blk_engine *base, const struct av_gmem *mem)
{
    struct uring_engine *engine = of(base);
    uint32_t count = 0, at = 0;
    int result;

    if (engine->pinned != NULL)
        return 0;
    for (uint32_t i = 0; i < mem->count; i++)
        count += (uint32_t)((mem->region[i].size_bytes + PINNED_MAX_BYTES - 1) / PINNED_MAX_BYTES);
    engine->pinned = calloc(count + 1, sizeof(*engine->pinned));
    if (engine->pinned == NULL)
        return -ENOMEM;
    for (uint32_t i = 0; i < mem->count; i++) {
        uint64_t size_bytes = mem->region[i].size_bytes;

        for (uint64_t done = 0; done < size_bytes; done += PINNED_MAX_BYTES) {
            uint64_t left = size_bytes - done;

            engine->pinned[at].iov_base = mem->region[i].hva + done;
            engine->pinned[at++].iov_len = left < PINNED_MAX_BYTES ? left : PINNED_MAX_BYTES;
        }
    }
    result = io_uring_register_buffers(&engine->ring, engine->pinned, count);
    if (result < 0) {
        free(engine->pinned);
        engine->pinned = NULL;
        return result;
    }
    engine->pinned_count = count;
    return 0;
}

static void uring_cancel(struct av_blk_engine *base)
{
    struct io_uring_sync_cancel_reg all = {
        .fd = -1,
        .flags = IORING_ASYNC_CANCEL_ANY | IORING_ASYNC_CANCEL_ALL,
        .timeout = { 0, 0 },
    };

    if (io_uring_sq_ready(&of(base)->ring) != 0)
        take_back(of(base), -ECANCELED);
    /* Kernels before 6.0 do not know it; what they do not cancel is waited for all the same. */
    io_uring_register_sync_cancel(&of(base)->ring, &all);
}

static void uring_destroy(struct av_blk_engine *engine)
{
    uring_unpin(engine);
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
    .pin = uring_pin,
    .cancel = uring_cancel,
    .unpin = uring_unpin,
    .destroy = uring_destroy,
};

static int ring_init(struct io_uring *ring, uint32_t depth)
{
    /* Completions are looked at when the thread comes around, so an interrupt of it for each is
     * wasted, as long as it can see that there are some; kernels before 5.19 do not know this. */
    unsigned flags = IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG;
    unsigned walls = av_walls_up() ? IORING_SETUP_R_DISABLED : 0;
    int result = io_uring_queue_init(depth, ring, flags | walls);

    return result == -EINVAL ? io_uring_queue_init(depth, ring, walls) : result;
}

/* liburing declares functions for these, and some versions of it do not export them. */
static int ring_register(const struct io_uring *ring, unsigned opcode, const void *argument,
                         unsigned count)
{
    long result = syscall(SYS_io_uring_register, ring->ring_fd, opcode, argument, count);

    return result < 0 ? -errno : 0;
}

/* No filter of system calls sees what is asked of a ring. Behind walls it does what we need of it,
 * for good, and that on the registered file alone. */
static int ring_restrict(struct io_uring *ring)
{
    static const uint8_t operations[] = {
        IORING_OP_READ,  IORING_OP_READV,  IORING_OP_READ_FIXED,  IORING_OP_FSYNC,
        IORING_OP_WRITE, IORING_OP_WRITEV, IORING_OP_WRITE_FIXED, IORING_OP_FALLOCATE,
    };
    static const uint8_t registers[] = {
        IORING_REGISTER_BUFFERS,
        IORING_UNREGISTER_BUFFERS,
        IORING_UNREGISTER_FILES,
        IORING_REGISTER_SYNC_CANCEL, /* the last: kernels before 6.0 do not know it */
    };
    struct io_uring_restriction rules[sizeof(operations) + sizeof(registers) + 2] = {0};
    unsigned count = 0;
    int result;

    for (size_t i = 0; i < sizeof(operations); i++, count++) {
        rules[count].opcode = IORING_RESTRICTION_SQE_OP;
        rules[count].sqe_op = operations[i];
    }
    rules[count].opcode = IORING_RESTRICTION_SQE_FLAGS_ALLOWED;
    rules[count++].sqe_flags = IOSQE_FIXED_FILE | IOSQE_ASYNC;
    rules[count].opcode = IORING_RESTRICTION_SQE_FLAGS_REQUIRED;
    rules[count++].sqe_flags = IOSQE_FIXED_FILE;
    for (size_t i = 0; i < sizeof(registers); i++, count++) {
        rules[count].opcode = IORING_RESTRICTION_REGISTER_OP;
        rules[count].register_op = registers[i];
    }
    result = ring_register(ring, IORING_REGISTER_RESTRICTIONS, rules, count);
    if (result == -EINVAL)
        result = ring_register(ring, IORING_REGISTER_RESTRICTIONS, rules, count - 1);
    return result < 0 ? result : ring_register(ring, IORING_REGISTER_ENABLE_RINGS, NULL, 0);
}

struct av_blk_engine *av_blk_uring_create(int fd, uint32_t depth, bool may_hang, int *error)
{
    struct uring_engine *engine = calloc(1, sizeof(*engine));
    int result;

    if (engine == NULL) {
        *error = ENOMEM;
        return NULL;
    }
    engine->base.ops = &uring_ops;
    engine->may_hang = may_hang;
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
    if (result == 0 && av_walls_up())
        result = ring_restrict(&engine->ring);
    if (result < 0) {
        *error = -result;
        uring_destroy(&engine->base);
        return NULL;
    }
    return &engine->base;
}
