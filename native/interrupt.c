#include "interrupt.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

struct av_interrupt {
    _Atomic uint32_t status;
    atomic_int fd;
    _Atomic uint64_t count;
};

struct av_interrupt *av_interrupt_create(int fd)
{
    struct av_interrupt *interrupt = calloc(1, sizeof(*interrupt));
    if (interrupt != NULL)
        atomic_init(&interrupt->fd, fd);
    return interrupt;
}

void av_interrupt_destroy(struct av_interrupt *interrupt)
{
    free(interrupt);
}

void av_interrupt_set_fd(struct av_interrupt *interrupt, int fd)
{
    atomic_store(&interrupt->fd, fd);
}

void av_interrupt_raise(struct av_interrupt *interrupt, uint32_t bits)
{
    uint64_t one = 1;
    int fd;

    /* The status bit comes first: the guest's handler reads it as soon as the edge is delivered,
     * and takes an interrupt with an empty status for somebody else's. */
    atomic_fetch_or(&interrupt->status, bits);
    fd = atomic_load(&interrupt->fd);
    if (fd < 0)
        return;
    atomic_fetch_add(&interrupt->count, 1);
    /* Full (EAGAIN) means that 2^64 - 2 edges are waiting: one more says nothing new. */
    if (write(fd, &one, sizeof(one)) < 0)
        return;
}

uint32_t av_interrupt_status(const struct av_interrupt *interrupt)
{
    return atomic_load(&interrupt->status);
}

void av_interrupt_ack(struct av_interrupt *interrupt, uint32_t bits)
{
    atomic_fetch_and(&interrupt->status, ~bits);
}

uint64_t av_interrupt_count(const struct av_interrupt *interrupt)
{
    return atomic_load(&interrupt->count);
}
