/* Inside of struct av_vcpu, for vcpu.c and vcpu_access.c. */
#ifndef AV_VCPU_INTERNAL_H
#define AV_VCPU_INTERNAL_H

#include <linux/kvm.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/types.h>

#include "counter.h"
#include "dispatch.h"
#include "vcpu.h"

/* What the last exit still owes the kernel when av_vcpu_run() is called again. */
enum pending { PENDING_NONE, PENDING_PIO, PENDING_MMIO };

struct av_vcpu {
    struct kvm_run *run;
    size_t run_bytes;
    int fd;
    struct av_dispatch *dispatch;
    _Atomic uint32_t kicked; /* a bool, as wide as a futex */
    atomic_bool in_run;
    _Atomic pid_t tid;
    enum pending pending;
    uint32_t pio_done; /* elements of the current string access already answered */
    uint64_t left_ns;  /* when av_vcpu_run() last returned; 0: never */
    uint64_t left_cpu_ns; /* and the thread's processor time then */
    uint32_t answered;    /* exits, here, since the budget was last looked at */
    struct av_vcpu_stats stats;
};

/* Where the next element of a port access is. */
uint8_t *av_vcpu_pio_data(struct av_vcpu *vcpu);
/* The elements of a port access that are left; true when Python has to see the next. */
bool av_vcpu_pio_go_on(struct av_vcpu *vcpu, struct av_exit *out);
/* A memory access outside RAM; true when Python has to see it. */
bool av_vcpu_mmio_exit(struct av_vcpu *vcpu, struct av_exit *out);

#endif
