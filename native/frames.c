#include "frames.h"

#include <errno.h>
#include <stddef.h>
#include <sys/mman.h>

static uint32_t space(uint32_t bytes)
{
    return ((uint32_t)offsetof(struct av_frame, data) + bytes + 7u) & ~7u;
}

int av_frames_init(struct av_frames *frames, uint32_t size_bytes)
{
    void *base = mmap(NULL, size_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (base == MAP_FAILED)
        return -errno;
    *frames = (struct av_frames){ .base = base, .size_bytes = size_bytes, .end = size_bytes };
    return 0;
}

void av_frames_fini(struct av_frames *frames)
{
    if (frames->base != NULL)
        munmap(frames->base, frames->size_bytes);
    frames->base = NULL;
}

struct av_frame *av_frames_reserve(struct av_frames *frames, uint32_t bytes)
{
    uint32_t needed = space(bytes), at = frames->tail;

    if (frames->tail >= frames->head) {
        /* `tail` never comes to equal `head` from behind: that would look empty. */
        if (frames->size_bytes - frames->tail < needed) {
            if (frames->head <= needed)
                return NULL;
            at = 0;
        }
    } else if (frames->head - frames->tail <= needed) {
        return NULL;
    }
    return (struct av_frame *)(frames->base + at);
}

void av_frames_commit(struct av_frames *frames, struct av_frame *frame)
{
    uint32_t at = (uint32_t)((uint8_t *)frame - frames->base), taken = space(frame->bytes);

    if (at != frames->tail)
        frames->end = frames->tail; /* what is behind stays unused this time round */
    else if (frames->tail >= frames->head)
        frames->end = frames->size_bytes;
    frames->tail = at + taken;
    frames->used_bytes += taken;
    frames->count++;
}

struct av_frame *av_frames_front(const struct av_frames *frames)
{
    return frames->count == 0 ? NULL : (struct av_frame *)(frames->base + frames->head);
}

void av_frames_pop(struct av_frames *frames)
{
    uint32_t taken = space(av_frames_front(frames)->bytes);

    frames->used_bytes -= taken;
    frames->head += taken;
    if (--frames->count == 0) {
        /* Back to the beginning, whose pages are in use already. */
        av_frames_clear(frames);
    } else if (frames->head == frames->end && frames->tail < frames->head) {
        frames->head = 0;
        frames->end = frames->size_bytes;
    }
}

void av_frames_clear(struct av_frames *frames)
{
    frames->head = frames->tail = frames->count = 0;
    frames->used_bytes = 0;
    frames->end = frames->size_bytes;
}
