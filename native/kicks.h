/* Kicks that bring no work.
 *
 * A driver kicks because it has offered chains. Now and then a kick comes when they are taken
 * already; one that comes thousands of times a second is a guest's way to keep a loop busy. So
 * kicks in vain are paid for: a few a second are free, and each chain earns more. Who has none left
 * is not listened to for a moment, after which its rings are looked at whether it kicked or not. */
#ifndef AV_KICKS_H
#define AV_KICKS_H

#include <stdint.h>

#include "bucket.h"

/* cdef begin */
/* No lock. vain: kicks that brought nothing; deaf: times the guest was not listened to. */
struct av_kicks {
    struct av_bucket bucket;
    uint64_t vain;
    uint64_t deaf;
};
/* free: by the second; burst: and at once; 0: as avmm has them. */
void av_kicks_init(struct av_kicks *kicks, uint64_t now_ns, uint64_t free, uint64_t burst);
/* Chains were taken, or as much other work as so many bring. */
void av_kicks_worked(struct av_kicks *kicks, uint64_t chains);
/* A kick came, and no work. For how long not to listen, 0 or AV_KICKS_DEAF_NS. */
uint64_t av_kicks_vain(struct av_kicks *kicks, uint64_t now_ns);
/* cdef end */

/* What is free of kicks in vain, by the second and at once; what a chain earns, since a driver
 * may kick again for what was taken meanwhile, whether we asked for kicks or not; how long the guest
 * is not listened to: as long as a disk takes, so that one who races more than we think hardly
 * notices. */
#define AV_KICKS_A_SECOND 100u
#define AV_KICKS_BURST 64u
#define AV_KICKS_EARNED 2u
#define AV_KICKS_DEAF_NS 4000000u

#endif
