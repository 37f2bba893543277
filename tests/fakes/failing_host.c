/* A host that refuses, for tests: preloaded, it stands before the calls of the C library that can
 * fail for want of something, and refuses those that failing_host.py arms.
 *
 * Of memory, only avmm's own calls are counted, and not Python's. Watches of uvloop's are not:
 * libuv ends the process when it is refused one. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum call {
    DESCRIPTOR = 1 << 0, /* all that makes one */
    MEMORY = 1 << 1,
    THREAD = 1 << 2,
    IOCTL = 1 << 3,
    WATCH = 1 << 4,
    LOCK = 1 << 5,
    RUN = 1 << 6, /* KVM_RUN */
    READ = 1 << 7,
    WRITE = 1 << 8,
    SYNC = 1 << 9,
    ALLOCATE = 1 << 10, /* fallocate() */
    SEND = 1 << 11,     /* a frame to a TAP */
    RECEIVE = 1 << 12,
};

/* What comes back of a transfer instead of an error. */
#define SHORT 0x10000

static struct {
    atomic_uint calls;
    atomic_long first, last; /* those that fail, counted from 1 */
    atomic_long seen;
    atomic_long failed;
    atomic_int error;
} plan;

__attribute__((visibility("default"))) void failing_host_arm(unsigned calls, long first, long last,
                                                             int error)
{
    atomic_store(&plan.calls, 0);
    atomic_store(&plan.first, first);
    atomic_store(&plan.last, last);
    atomic_store(&plan.error, error);
    atomic_store(&plan.seen, 0);
    atomic_store(&plan.failed, 0);
    atomic_store(&plan.calls, calls);
}

__attribute__((visibility("default"))) long failing_host_seen(void)
{
    return atomic_load(&plan.seen);
}

__attribute__((visibility("default"))) long failing_host_failed(void)
{
    return atomic_load(&plan.failed);
}

static bool armed(enum call call)
{
    return (atomic_load_explicit(&plan.calls, memory_order_relaxed) & call) != 0;
}

static int refused(void)
{
    long number = atomic_fetch_add(&plan.seen, 1) + 1;

    if (number < atomic_load(&plan.first) || number > atomic_load(&plan.last))
        return 0;
    atomic_fetch_add(&plan.failed, 1);
    return atomic_load(&plan.error);
}

/* The error with which this call is to fail, or 0. */
static int refuse(enum call call)
{
    return armed(call) ? refused() : 0;
}

static bool comes_of(const void *from, const char *name)
{
    Dl_info info;

    return dladdr(from, &info) != 0 && info.dli_fname != NULL &&
           strstr(info.dli_fname, name) != NULL;
}

#define EXPORT __attribute__((visibility("default")))
#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL_IF(test, result)                                                                      \
    do {                                                                                           \
        int error_ = (test);                                                                       \
        if (error_ != 0) {                                                                         \
            errno = error_;                                                                        \
            return result;                                                                         \
        }                                                                                          \
    } while (0)

/* --- descriptors ----------------------------------------------------------------------- */

#define PLAIN(call, type, name, declared, passed)                                                  \
    EXPORT type name declared                                                                      \
    {                                                                                              \
        static __typeof__(&name) next;                                                             \
                                                                                                   \
        if (next == NULL)                                                                          \
            next = NEXT(name);                                                                     \
        FAIL_IF(refuse(call), -1);                                                                 \
        return next passed;                                                                        \
    }

#define OPEN(name, declared, passed)                                                               \
    EXPORT int name declared                                                                       \
    {                                                                                              \
        static __typeof__(&name) next;                                                             \
        mode_t mode = 0;                                                                           \
                                                                                                   \
        if (next == NULL)                                                                          \
            next = NEXT(name);                                                                     \
        if ((flags & (O_CREAT | O_TMPFILE)) != 0) {                                                \
            va_list list;                                                                          \
            va_start(list, flags);                                                                 \
            mode = va_arg(list, mode_t);                                                           \
            va_end(list);                                                                          \
        }                                                                                          \
        FAIL_IF(refuse(DESCRIPTOR), -1);                                                           \
        return next passed;                                                                        \
    }

OPEN(open, (const char *path, int flags, ...), (path, flags, mode))
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode))
OPEN(openat, (int folder, const char *path, int flags, ...), (folder, path, flags, mode))
OPEN(openat64, (int folder, const char *path, int flags, ...), (folder, path, flags, mode))

int eventfd(unsigned count, int flags);
int timerfd_create(int clock, int flags);
int memfd_create(const char *name, unsigned flags);
int socket(int domain, int type, int protocol);
int socketpair(int domain, int type, int protocol, int fds[2]);

PLAIN(DESCRIPTOR, int, eventfd, (unsigned count, int flags), (count, flags))
PLAIN(DESCRIPTOR, int, timerfd_create, (int clock, int flags), (clock, flags))
PLAIN(DESCRIPTOR, int, memfd_create, (const char *name, unsigned flags), (name, flags))
PLAIN(DESCRIPTOR, int, epoll_create1, (int flags), (flags))
PLAIN(DESCRIPTOR, int, socket, (int domain, int type, int protocol), (domain, type, protocol))
PLAIN(DESCRIPTOR, int, socketpair, (int domain, int type, int protocol, int fds[2]),
      (domain, type, protocol, fds))
int pipe2(int fds[2], int flags);
PLAIN(DESCRIPTOR, int, pipe2, (int fds[2], int flags), (fds, flags))
int dup(int fd);
PLAIN(DESCRIPTOR, int, dup, (int fd), (fd))

#define FCNTL(name)                                                                                \
    EXPORT int name(int fd, int command, ...)                                                      \
    {                                                                                              \
        static __typeof__(&name) next;                                                             \
        void *argument;                                                                            \
        va_list list;                                                                              \
                                                                                                   \
        if (next == NULL)                                                                          \
            next = NEXT(name);                                                                     \
        va_start(list, command);                                                                   \
        argument = va_arg(list, void *);                                                 \
        va_end(list);                                                                              \
        if (command == F_DUPFD || command == F_DUPFD_CLOEXEC)                                      \
            FAIL_IF(refuse(DESCRIPTOR), -1);                                                       \
        else if (command == F_OFD_SETLK)                                                           \
            FAIL_IF(refuse(LOCK), -1);                                                             \
        return next(fd, command, argument);                                                        \
    }

FCNTL(fcntl)
FCNTL(fcntl64)

/* liburing's calls do not go through the C library; they return -errno. It comes with avmm, so it
 * is not among what is next after us. */
static void *liburing(const char *name)
{
    void *library = dlopen("liburing.so.2", RTLD_LAZY | RTLD_NOLOAD);

    return library == NULL ? NULL : dlsym(library, name);
}

#define LIBURING(call, name, declared, passed)                                                     \
    EXPORT int name declared                                                                       \
    {                                                                                              \
        static __typeof__(&name) next;                                                             \
        int error;                                                                                 \
                                                                                                   \
        if (next == NULL)                                                                          \
            next = (__typeof__(&name))liburing(#name);                                             \
        error = refuse(call);                                                                      \
        return error != 0 ? -error : next passed;                                                  \
    }

LIBURING(DESCRIPTOR, io_uring_queue_init, (unsigned entries, struct io_uring *ring, unsigned flags),
         (entries, ring, flags))
LIBURING(MEMORY, io_uring_register_files, (struct io_uring *ring, const int *files, unsigned count),
         (ring, files, count))
LIBURING(MEMORY, io_uring_register_eventfd, (struct io_uring *ring, int fd), (ring, fd))
LIBURING(MEMORY, io_uring_register_buffers,
         (struct io_uring *ring, const struct iovec *iovecs, unsigned count), (ring, iovecs, count))

/* --- memory ---------------------------------------------------------------------------- */

/* These exist so that a replacement can be written without asking for one's own memory. */
void *__libc_malloc(size_t size);
void *__libc_calloc(size_t count, size_t size);
void *__libc_realloc(void *old, size_t size);
void *__libc_memalign(size_t alignment, size_t size);

#define OURS comes_of(__builtin_return_address(0), "/_native")
#define REFUSE_OURS (armed(MEMORY) && OURS ? refused() : 0)

EXPORT void *malloc(size_t size)
{
    FAIL_IF(REFUSE_OURS, NULL);
    return __libc_malloc(size);
}

EXPORT void *calloc(size_t count, size_t size)
{
    FAIL_IF(REFUSE_OURS, NULL);
    return __libc_calloc(count, size);
}

EXPORT void *realloc(void *old, size_t size)
{
    FAIL_IF(REFUSE_OURS, NULL);
    return __libc_realloc(old, size);
}

EXPORT int posix_memalign(void **out, size_t alignment, size_t size)
{
    int error = REFUSE_OURS;

    if (error != 0)
        return error;
    *out = __libc_memalign(alignment, size);
    return *out == NULL ? ENOMEM : 0;
}

/* Ours, and what the standard library's module mmap maps for us. */
#define MMAP(name, offset)                                                                         \
    void *name(void *at, size_t size, int protection, int flags, int fd, offset from);             \
    EXPORT void *name(void *at, size_t size, int protection, int flags, int fd, offset from)       \
    {                                                                                              \
        static __typeof__(&name) next;                                                             \
                                                                                                   \
        if (next == NULL)                                                                          \
            next = NEXT(name);                                                                     \
        FAIL_IF(armed(MEMORY) && (OURS || comes_of(__builtin_return_address(0), "/mmap."))         \
                    ? refused()                                                                    \
                    : 0,                                                                           \
                (void *)-1);                                                                       \
        return next(at, size, protection, flags, fd, from);                                        \
    }

MMAP(mmap, off_t)
MMAP(mmap64, off64_t)

/* --- threads, watches, ioctls ---------------------------------------------------------- */

EXPORT int pthread_create(pthread_t *thread, const pthread_attr_t *attributes,
                          void *(*start)(void *), void *argument)
{
    static __typeof__(&pthread_create) next;
    int error;

    if (next == NULL)
        next = NEXT(pthread_create);
    error = refuse(THREAD);
    return error != 0 ? error : next(thread, attributes, start, argument);
}

EXPORT int epoll_ctl(int epoll, int operation, int fd, struct epoll_event *event)
{
    static __typeof__(&epoll_ctl) next;

    if (next == NULL)
        next = NEXT(epoll_ctl);
    if (operation == EPOLL_CTL_ADD && !comes_of(__builtin_return_address(0), "/uvloop/"))
        FAIL_IF(refuse(WATCH), -1);
    return next(epoll, operation, fd, event);
}

EXPORT int ioctl(int fd, unsigned long request, ...)
{
    static __typeof__(&ioctl) next;
    void *argument;
    va_list list;

    if (next == NULL)
        next = NEXT(ioctl);
    va_start(list, request);
    argument = va_arg(list, void *);
    va_end(list);
    if (request == KVM_RUN)
        FAIL_IF(refuse(RUN), -1);
    else if (_IOC_DIR(request) != 0 || _IOC_TYPE(request) == KVMIO)
        FAIL_IF(refuse(IOCTL), -1);
    return next(fd, request, argument);
}

/* --- transfers ------------------------------------------------------------------------- */

/* Of a transfer that is to be short, a half of its first piece, or that piece, in sectors. */
static struct iovec shortened(const struct iovec *iov)
{
    struct iovec part = *iov;

    if (part.iov_len >= 1024)
        part.iov_len = part.iov_len / 1024 * 512;
    return part;
}

#define TRANSFER(call, name)                                                                       \
    EXPORT ssize_t name(int fd, const struct iovec *iov, int count, off_t offset)                  \
    {                                                                                              \
        static __typeof__(&name) next;                                                             \
        int error = refuse(call);                                                                  \
        struct iovec part = shortened(iov);                                                        \
                                                                                                   \
        if (next == NULL)                                                                          \
            next = NEXT(name);                                                                     \
        if (error == SHORT)                                                                        \
            return next(fd, &part, 1, offset);                                                     \
        FAIL_IF(error, -1);                                                                        \
        return next(fd, iov, count, offset);                                                       \
    }

TRANSFER(READ, preadv)
TRANSFER(WRITE, pwritev)

int fdatasync(int fd);
PLAIN(SYNC, int, fdatasync, (int fd), (fd))
PLAIN(ALLOCATE, int, fallocate, (int fd, int mode, off_t offset, off_t length),
      (fd, mode, offset, length))

/* Frames; what is smaller is an eventfd's. */
#define FRAME_MIN_BYTES 14u

#define FRAME(call, name, declared, passed, bytes)                                                 \
    EXPORT ssize_t name declared                                                                   \
    {                                                                                              \
        static __typeof__(&name) next;                                                             \
                                                                                                   \
        if (next == NULL)                                                                          \
            next = NEXT(name);                                                                     \
        FAIL_IF(armed(call) && OURS && (bytes) >= FRAME_MIN_BYTES ? refused() : 0, -1);            \
        return next passed;                                                                        \
    }

FRAME(SEND, write, (int fd, const void *data, size_t size), (fd, data, size), size)
FRAME(SEND, writev, (int fd, const struct iovec *iov, int count), (fd, iov, count),
      FRAME_MIN_BYTES)
FRAME(RECEIVE, read, (int fd, void *data, size_t size), (fd, data, size), size)
FRAME(RECEIVE, readv, (int fd, const struct iovec *iov, int count), (fd, iov, count),
      FRAME_MIN_BYTES)

static enum call call_of(const struct io_uring_sqe *sqe)
{
    switch (sqe->opcode) {
    case IORING_OP_READ:
    case IORING_OP_READV:
    case IORING_OP_READ_FIXED:
        return READ;
    case IORING_OP_WRITE:
    case IORING_OP_WRITEV:
    case IORING_OP_WRITE_FIXED:
        return WRITE;
    case IORING_OP_FSYNC:
        return SYNC;
    default:
        return ALLOCATE;
    }
}

static void shorten(struct io_uring_sqe *sqe)
{
    static __thread struct iovec part; /* which the kernel copies when it takes the entry */

    if (sqe->opcode == IORING_OP_READV || sqe->opcode == IORING_OP_WRITEV) {
        part = shortened((const struct iovec *)(uintptr_t)sqe->addr);
        sqe->addr = (uintptr_t)&part;
        sqe->len = 1;
    } else {
        sqe->len = (unsigned)shortened(&(struct iovec){ .iov_len = sqe->len }).iov_len;
    }
}

/* An entry that does nothing and has a result of our choice, from Linux 6.10 on. */
static void replace(struct io_uring_sqe *sqe, int error)
{
    uint64_t data = sqe->user_data;

    io_uring_prep_nop(sqe);
    sqe->rw_flags = 1; /* IORING_NOP_INJECT_RESULT */
    sqe->len = (unsigned)-error;
    sqe->user_data = data;
}

EXPORT int io_uring_submit(struct io_uring *ring)
{
    static __typeof__(&io_uring_submit) next;
    struct io_uring_sq *sq = &ring->sq;

    if (next == NULL)
        next = (__typeof__(&io_uring_submit))liburing("io_uring_submit");
    for (unsigned at = sq->sqe_head; at != sq->sqe_tail; at++) {
        struct io_uring_sqe *sqe = &sq->sqes[at & *sq->kring_mask];
        int error = refuse(call_of(sqe));

        if (error == SHORT)
            shorten(sqe);
        else if (error != 0)
            replace(sqe, error);
    }
    return next(ring);
}

/* --- the clock ------------------------------------------------------------------------- */

static atomic_long clock_offset_s;

EXPORT void failing_host_set_clock(long offset_s)
{
    atomic_store(&clock_offset_s, offset_s);
}

EXPORT int clock_gettime(clockid_t clock, struct timespec *now)
{
    static __typeof__(&clock_gettime) next;
    int result;

    if (next == NULL)
        next = NEXT(clock_gettime);
    result = next(clock, now);
    if (result == 0 && clock == CLOCK_REALTIME)
        now->tv_sec += atomic_load(&clock_offset_s);
    return result;
}

EXPORT time_t time(time_t *out)
{
    struct timespec now;

    clock_gettime(CLOCK_REALTIME, &now);
    if (out != NULL)
        *out = now.tv_sec;
    return now.tv_sec;
}
