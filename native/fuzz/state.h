/* A machine's devices as they are while it runs: lanes on I/O threads, two vCPUs that drive them
 * with what an input says, and the loop, which does with them what Python does.
 *
 * What is found here depends on how threads come to run, so an input that fails may need to be
 * given to the target several times. */
#ifndef AV_FUZZ_STATE_H
#define AV_FUZZ_STATE_H

#include <pthread.h>

#include "blk_internal.h"
#include "fuzz.h"
#include "net_internal.h"
#include "rng.h"
#include "uart.h"
#include "vcpu_internal.h"

#define STATE_HOMES 2u
#define STATE_DISKS 2u /* two queues of one disk: they share its file, limits and failure */
#define STATE_LANES 4u
#define STATE_VCPUS 2u
#define STATE_REGS 2u
#define STATE_REGS_BYTES 64u
#define STATE_SECTORS 64u
#define STATE_DATA_BYTES 2048u
#define STATE_MMIO_GPA 0xd1000000u
#define STATE_REGS_GPA 0xd0000000u /* the first; each has a page */

enum state_kind { STATE_DISK, STATE_NIC, STATE_RNG };

/* A lane, its queues and what their driver knows. */
struct state_lane {
    enum state_kind kind;
    struct av_lane *lane;
    struct av_home *home;
    struct fuzz_guest guest;
    struct fuzz_queue queue[2];
    uint32_t queues;
    int kick_fd[2];
    uint64_t data_gpa; /* of STATE_DATA_BYTES */
};

struct state_machine {
    struct av_home *home[STATE_HOMES];
    struct state_lane lane[STATE_LANES]; /* disks first, then the NIC, then the rng */
    struct av_blk *disk[STATE_DISKS];
    struct av_net *nic;
    struct av_rng *rng;
    int lost_errno;
    struct av_limiter *limiter[2]; /* of the disk and what the NIC sends; of what it receives */
    struct av_cable *cable;
    struct av_cable_end *own, *peer;
    int file_fd, wire_fd, irq_fd;
    struct av_dispatch *dispatch;
    struct av_regs *regs[STATE_REGS];
    struct av_uart *uart;
    pthread_mutex_t drivers; /* what the drivers know of their queues */
    bool mergeable;
};

/* One vCPU: a thread and its part of the input. */
struct state_vcpu {
    struct state_machine *machine;
    struct fuzz_input in;
    struct av_vcpu vcpu;
    pthread_t thread;
};

/* One step of a vCPU: offers, kicks, register accesses, scribbles. */
void state_guest_step(struct state_vcpu *vcpu);
/* One step of the loop: resets, pauses, settings, statistics, the peer on the cable. */
void state_loop_step(struct state_machine *machine, struct fuzz_input *in);
/* Start a lane, or bring it to rest; what it was is not asked. */
void state_start(struct state_lane *lane);
void state_rest(struct state_lane *lane);

#endif
