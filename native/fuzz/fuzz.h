/* What fuzz targets share: reading the input, guest memory, a hostile driver of one queue.
 *
 * A target is one file, target_NAME.c, that has LLVMFuzzerTestOneInput(). It reads the input as
 * what a guest or peer may write, in whatever order, and checks what has to hold after each step.
 * The same input always does the same: nothing depends on time, threads or earlier inputs; but for
 * target_state.c, which is about threads. */
#ifndef AV_FUZZ_H
#define AV_FUZZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "vring_internal.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* What holds for any input. A failure ends the process, as a fault of memory does. */
#define CHECK(condition)                                                                          \
    do {                                                                                          \
        if (!(condition)) {                                                                       \
            fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition);        \
            abort();                                                                              \
        }                                                                                         \
    } while (0)

/* The input, read from the front; after its end come zeroes. */
struct fuzz_input {
    const uint8_t *at;
    size_t left;
};
static inline bool fuzz_more(const struct fuzz_input *in)
{
    return in->left != 0;
}
void fuzz_bytes(struct fuzz_input *in, void *to, size_t count);
uint8_t fuzz_u8(struct fuzz_input *in);
uint16_t fuzz_u16(struct fuzz_input *in);
uint32_t fuzz_u32(struct fuzz_input *in);
uint64_t fuzz_u64(struct fuzz_input *in);
/* A bounded choice, by one byte: 0..count-1, of at most 256. */
uint32_t fuzz_below(struct fuzz_input *in, uint32_t count);
/* Any 64 bits, more often than not small or close to a border. */
uint64_t fuzz_number(struct fuzz_input *in);

/* Guest memory: each region is an allocation of its own and of its exact size, so that a byte too
 * far is seen. Regions follow one another in guest physical memory. */
struct fuzz_guest {
    struct av_gmem mem;
    uint64_t end_gpa;
    uint64_t data_gpa; /* what descriptors mostly name, to the end of guest memory */
};
void fuzz_guest_init(struct fuzz_guest *guest);
void fuzz_guest_fini(struct fuzz_guest *guest);
/* The region's gpa, a multiple of 16. It is zeroed. */
uint64_t fuzz_guest_add(struct fuzz_guest *guest, uint32_t size_bytes);
/* One that descriptors name; after all queues are laid out. */
uint64_t fuzz_guest_add_data(struct fuzz_guest *guest, uint32_t size_bytes);
/* Whether [at, at + bytes) lies in one region. */
bool fuzz_guest_holds(const struct fuzz_guest *guest, const void *at, size_t bytes);
/* Write bytes of the input anywhere. */
void fuzz_guest_scribble(struct fuzz_guest *guest, struct fuzz_input *in);

/* A driver of one queue, and the device's ring. */
struct fuzz_queue {
    struct fuzz_guest *guest;
    struct av_interrupt *interrupt;
    struct av_vring *ring;
    struct av_vring_setup setup;
    struct av_desc *desc;
    struct av_avail *avail; /* split */
    uint16_t at;            /* where its next descriptor goes */
    bool wrap;              /* packed: the wrap counter there */
    uint16_t idx;           /* split: of the available ring */
};
/* Lay a queue out and start it: size and features as the input says. */
void fuzz_queue_init(struct fuzz_queue *queue, struct fuzz_guest *guest, struct fuzz_input *in,
                     bool packed);
void fuzz_queue_fini(struct fuzz_queue *queue);
/* Begin again in an empty ring, device and driver. */
void fuzz_queue_restart(struct fuzz_queue *queue);
/* One thing a driver may do: offer a chain, direct or indirect, of sense or of none, suppress
 * interrupts, or write anywhere in memory. */
void fuzz_queue_step(struct fuzz_queue *queue, struct fuzz_input *in);
/* Offer a chain of these segments. */
void fuzz_queue_offer(struct fuzz_queue *queue, const struct av_desc *segment, uint32_t count);
/* What holds for every chain that was popped. */
void fuzz_queue_check_chain(const struct fuzz_queue *queue, const struct av_chain *chain,
                            uint32_t iov_max);

/* Flags of a segment for fuzz_queue_offer(), both layouts. */
static inline struct av_desc fuzz_segment(uint64_t gpa, uint32_t bytes, uint16_t flags)
{
    return (struct av_desc){ .gpa = gpa, .rest = bytes | (uint64_t)flags << 32 };
}

#endif
