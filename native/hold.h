/* Holding an interrupt back for a moment, so that it speaks for several requests. */
#ifndef AV_HOLD_H
#define AV_HOLD_H

#include <stdbool.h>
#include <stdint.h>

/* cdef begin */
/* Where requests are served faster than the driver makes them, each would have a kick and an
 * interrupt of its own, and would be interrupted in making the next: a vCPU loses far more by that
 * than the request takes. So a lane may hold back what it has served, with kicks off, and look
 * again a little later, for as long as the driver goes on making requests.
 *
 * What that is worth is found out by trying. A hold during which nothing more came was in vain, and
 * the next tries come ever more rarely, so a driver with one request at a time hardly ever waits.
 * One that ended because no more came tells how many the driver makes before it waits for an
 * answer; from then on half of those are enough, so that it never comes to waiting. */
struct av_hold {
    uint64_t until_ns; /* when to look again */
    uint64_t wait_ns;  /* from one look to the next */
    uint32_t count;    /* held now; 0: no hold */
    uint32_t fresh;    /* of those, since the last look */
    uint32_t enough;   /* end when so many are held */
    uint32_t skip;     /* so many times there will be no hold */
    uint32_t in_vain;  /* holds in a row that were */
};
void av_hold_init(struct av_hold *hold);
/* fresh: served since the last call. due: the driver wants an interrupt for what it was not shown.
 * 0: show it now; else hold it, and call again at that time by CLOCK_MONOTONIC at the latest. */
uint64_t av_hold_until(struct av_hold *hold, uint32_t fresh, int due, uint64_t now_ns);
/* cdef end */

static inline bool av_holds(const struct av_hold *hold)
{
    return hold->count != 0;
}

#endif
