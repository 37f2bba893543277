#include "rng.h"

#include <errno.h>
#include <sys/random.h>

#define SEGMENTS_MAX 1024
/* getrandom() gives up to this much in one piece, whatever signals come. */
#define PIECE_BYTES 256u
/* What a buffer costs of the budget at least, so that empty ones cannot keep us here for ever. */
#define BUFFER_COST_BYTES 64u

/* Fill one buffer, at most `room` bytes of it; how many, or -errno. */
static int64_t fill(const struct av_chain *chain, uint32_t room)
{
    uint32_t done = 0;

    for (uint32_t i = chain->readable; i < (uint32_t)chain->readable + chain->writable; i++) {
        uint8_t *at = chain->iov[i].iov_base;
        size_t left = chain->iov[i].iov_len;

        while (left != 0 && done < room) {
            size_t want = left < PIECE_BYTES ? left : PIECE_BYTES;
            ssize_t got = getrandom(at, want < room - done ? want : room - done, 0);
            if (got < 0)
                return -errno;
            at += got;
            left -= (size_t)got;
            done += (uint32_t)got;
        }
    }
    return done;
}

int av_rng_kick(struct av_vring *ring, int kick_fd, uint32_t budget_bytes)
{
    struct iovec iov[SEGMENTS_MAX];
    struct av_chain chain;
    uint32_t spent = 0;
    int result;

    av_vring_take_kick(ring, kick_fd);
    do {
        av_vring_kicks_off(ring);
        while ((result = av_vring_pop(ring, &chain, iov, SEGMENTS_MAX)) > 0) {
            /* A driver may offer megabytes: a partly filled buffer is a legal answer. */
            int64_t filled = fill(&chain, budget_bytes - spent);
            if (filled < 0) {
                result = (int)filled;
                break;
            }
            av_vring_push(ring, chain.head, (uint32_t)filled);
            spent += filled > BUFFER_COST_BYTES ? (uint32_t)filled : BUFFER_COST_BYTES;
            if (spent >= budget_bytes)
                break;
        }
        av_vring_flush(ring);
        if (result < 0)
            return result;
        if (spent >= budget_bytes)
            return 1;
    } while (av_vring_kicks_on(ring));
    return 0;
}
