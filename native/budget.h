/* How much of the program's time a VM's exits may take.
 *
 * A guest chooses when it exits, and what is answered in Python or on the loop takes time from
 * all others in the process: the GIL and the loop are theirs too. One VM's vCPU threads and its
 * work on the loop charge what they spent; a vCPU that goes on while the VM owes, sleeps until it
 * is paid. */
#ifndef AV_BUDGET_H
#define AV_BUDGET_H

#include <stdint.h>

/* cdef begin */
/* Any thread. share_ppm: of one processor's time, in millionths. burst_ns: what may be spent at
 * once, after a rest. NULL: errno. */
struct av_budget;
struct av_budget *av_budget_create(uint32_t share_ppm, uint64_t burst_ns, uint64_t now_ns);
void av_budget_destroy(struct av_budget *budget); /* after the vCPUs that use it */
/* What was done for the guest took so long. */
void av_budget_spend(struct av_budget *budget, uint64_t spent_ns, uint64_t now_ns);
/* How long who spends has to wait from now on; 0: not at all. */
uint64_t av_budget_wait_ns(struct av_budget *budget, uint64_t now_ns);
/* cdef end */

/* More is never owed: one long answer, of a host that is busy, must not stop a guest for long. */
#define AV_BUDGET_OWED_MAX_NS 100000000u
/* Who waits waits until so much may be spent: a sleep for each exit would cost more than exits. */
#define AV_BUDGET_TURN_NS 500000u

#endif
