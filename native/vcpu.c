#include "vcpu.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "vcpu_internal.h"
#include "walls.h"

#define SECOND_NS 1000000000u
/* Exits answered here cost nobody but their vCPU, except that the loop takes what they leave for
 * it, as serial output. So those that cost a microsecond look at the clock only now and then. */
#define ANSWERS_A_LOOK 64u

static int kick_signal(void)
{
    return SIGRTMIN + 2;
}

static void on_kick(int number)
{
    (void)number; /* that the signal interrupts KVM_RUN is all it is for */
}

static uint64_t clock_ns(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * SECOND_NS + (uint64_t)now.tv_nsec;
}

static uint64_t now_ns(void)
{
    return clock_ns(CLOCK_MONOTONIC);
}

struct av_vcpu *av_vcpu_create(int vcpu_fd, size_t run_bytes, struct av_dispatch *dispatch,
                               int *error)
{
    struct sigaction old, kick = { .sa_handler = on_kick };
    struct av_vcpu *vcpu = calloc(1, sizeof(*vcpu));
    if (vcpu == NULL) {
        *error = ENOMEM;
        return NULL;
    }
    vcpu->fd = vcpu_fd;
    vcpu->dispatch = dispatch;
    vcpu->run_bytes = run_bytes;
    vcpu->run = mmap(NULL, run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu_fd, 0);
    if (vcpu->run == MAP_FAILED) {
        *error = errno;
        free(vcpu);
        return NULL;
    }
    /* No SA_RESTART: the ioctl has to return. The handler is the process's, so take the
     * signal only from nobody. */
    sigemptyset(&kick.sa_mask);
    if (sigaction(kick_signal(), NULL, &old) != 0 ||
        (old.sa_handler != SIG_DFL && old.sa_handler != on_kick) ||
        sigaction(kick_signal(), &kick, NULL) != 0) {
        *error = EBUSY;
        av_vcpu_destroy(vcpu);
        return NULL;
    }
    return vcpu;
}

void av_vcpu_destroy(struct av_vcpu *vcpu)
{
    if (vcpu == NULL)
        return;
    munmap(vcpu->run, vcpu->run_bytes);
    free(vcpu);
}

int av_vcpu_enter_thread(void)
{
    sigset_t set;
    sigfillset(&set);
    sigdelset(&set, kick_signal());
    av_walls_thread(AV_ROLE_VCPU);
    return -pthread_sigmask(SIG_SETMASK, &set, NULL);
}

/* The kick has three parts, in this order: the word that says it was meant (kicked), the flag
 * that makes a KVM_RUN not yet entered return at once (immediate_exit), and the signal that ends
 * one already entered. The vCPU clears immediate_exit before it reads kicked; so either it sees
 * this kick, or this kick's immediate_exit is still to come and ends the next KVM_RUN. All four
 * accesses are sequentially consistent: the pattern is Dekker's, and weaker order would let both
 * sides miss each other. A signal alone would be lost between the check and the ioctl. */
void av_vcpu_kick(struct av_vcpu *vcpu)
{
    atomic_store(&vcpu->kicked, 1);
    __atomic_store_n(&vcpu->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, &vcpu->kicked, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
    if (atomic_load(&vcpu->in_run))
        syscall(SYS_tgkill, getpid(), atomic_load(&vcpu->tid), kick_signal());
}

static bool take_kick(struct av_vcpu *vcpu)
{
    __atomic_store_n(&vcpu->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
    return atomic_exchange(&vcpu->kicked, 0) != 0;
}

/* While the VM owes, sleep, or until a kick: the next KVM_RUN sees that one. */
static void wait_for_budget(struct av_vcpu *vcpu)
{
    uint64_t began = now_ns(), now = began, wait_ns;
    bool delayed = false;

    vcpu->answered = 0;
    while (atomic_load(&vcpu->kicked) == 0 &&
           (wait_ns = av_budget_wait_ns(vcpu->dispatch->budget, now)) != 0) {
        struct timespec wait = { .tv_sec = (time_t)(wait_ns / SECOND_NS),
                                 .tv_nsec = (long)(wait_ns % SECOND_NS) };

        av_count(&vcpu->stats.delays, !delayed);
        delayed = true;
        syscall(SYS_futex, &vcpu->kicked, FUTEX_WAIT_PRIVATE, 0, &wait, NULL, 0);
        now = now_ns();
    }
    av_count(&vcpu->stats.delayed_ns, now - began);
}

/* Time that was spent outside of av_vcpu_run(). Of the thread's processor time, since waiting for
 * the GIL or the loop takes nothing from others. */
static void charge(struct av_vcpu *vcpu)
{
    uint64_t now = now_ns();

    av_count(&vcpu->stats.python_ns, now - vcpu->left_ns);
    if (vcpu->dispatch->budget != NULL)
        av_budget_spend(vcpu->dispatch->budget,
                        clock_ns(CLOCK_THREAD_CPUTIME_ID) - vcpu->left_cpu_ns, now);
}

static void leave(struct av_vcpu *vcpu)
{
    vcpu->left_ns = now_ns();
    if (vcpu->dispatch->budget != NULL)
        vcpu->left_cpu_ns = clock_ns(CLOCK_THREAD_CPUTIME_ID);
}

/* Exits that end or park the vCPU, in av_exit's words. */
static void final_exit(struct av_vcpu *vcpu, struct av_exit *out)
{
    const struct kvm_run *run = vcpu->run;

    av_count(&vcpu->stats.other, 1);
    switch (run->exit_reason) {
    case KVM_EXIT_HLT:
        out->kind = AV_EXIT_HLT;
        break;
    case KVM_EXIT_SHUTDOWN:
        out->kind = AV_EXIT_SHUTDOWN;
        break;
    case KVM_EXIT_SYSTEM_EVENT:
        out->kind = AV_EXIT_SYSTEM_EVENT;
        out->value = run->system_event.type;
        break;
    case KVM_EXIT_FAIL_ENTRY:
        out->kind = AV_EXIT_FAIL_ENTRY;
        out->value = run->fail_entry.hardware_entry_failure_reason;
        break;
    case KVM_EXIT_INTERNAL_ERROR:
        out->kind = AV_EXIT_INTERNAL_ERROR;
        out->value = run->internal.suberror;
        break;
    default:
        out->kind = AV_EXIT_UNKNOWN;
        out->value = run->exit_reason;
    }
}

/* What the last exit left open: the value of a read, the rest of a string access.
 * True when Python has to see more before the guest can go on. */
static bool settle(struct av_vcpu *vcpu, struct av_exit *exit)
{
    struct kvm_run *run = vcpu->run;

    if (vcpu->pending == PENDING_MMIO) {
        if (!run->mmio.is_write)
            memcpy(run->mmio.data, &exit->value, run->mmio.len);
        vcpu->pending = PENDING_NONE;
    } else if (vcpu->pending == PENDING_PIO) {
        if (exit->kind == AV_EXIT_PIO_READ || exit->kind == AV_EXIT_MMIO_READ)
            memcpy(av_vcpu_pio_data(vcpu), &exit->value, run->io.size);
        /* A byte the full UART did not take is offered again. */
        if (exit->kind != AV_EXIT_UART_FULL)
            vcpu->pio_done++;
        return av_vcpu_pio_go_on(vcpu, exit);
    }
    return false;
}

/* One KVM_RUN and its exit; 1 when *exit is for Python, 0 to go on, or -errno. */
static int run_once(struct av_vcpu *vcpu, struct av_exit *exit)
{
    if (ioctl(vcpu->fd, KVM_RUN, 0) != 0) {
        if (errno != EINTR && errno != EAGAIN)
            return -errno;
        av_count(&vcpu->stats.signals, 1);
        if (!take_kick(vcpu))
            return 0;
        exit->kind = AV_EXIT_KICKED;
        return 1;
    }
    switch (vcpu->run->exit_reason) {
    case KVM_EXIT_IO:
        vcpu->pio_done = 0;
        return av_vcpu_pio_go_on(vcpu, exit);
    case KVM_EXIT_MMIO:
        return av_vcpu_mmio_exit(vcpu, exit);
    case KVM_EXIT_INTR:
        return 0;
    default:
        final_exit(vcpu, exit);
        return 1;
    }
}

int av_vcpu_run(struct av_vcpu *vcpu, struct av_exit *exit)
{
    static __thread pid_t tid;
    int result;

    if (tid == 0)
        tid = (pid_t)syscall(SYS_gettid);
    if (vcpu->left_ns != 0)
        charge(vcpu);
    result = settle(vcpu, exit);
    if (result == 0) {
        if (vcpu->dispatch->budget != NULL)
            wait_for_budget(vcpu);
        atomic_store(&vcpu->tid, tid);
        atomic_store(&vcpu->in_run, true);
        do {
            result = run_once(vcpu, exit);
            if (result == 0 && ++vcpu->answered >= ANSWERS_A_LOOK &&
                vcpu->dispatch->budget != NULL)
                wait_for_budget(vcpu);
        } while (result == 0);
        atomic_store(&vcpu->in_run, false);
    }
    leave(vcpu);
    return result < 0 ? result : 0;
}

void av_vcpu_statistics(const struct av_vcpu *vcpu, struct av_vcpu_stats *out)
{
    const struct av_vcpu_stats *stats = &vcpu->stats;

    *out = (struct av_vcpu_stats){
        .pio_python = av_counted(&stats->pio_python),
        .mmio_python = av_counted(&stats->mmio_python),
        .uart = av_counted(&stats->uart),
        .interrupt = av_counted(&stats->interrupt),
        .registers = av_counted(&stats->registers),
        .unassigned = av_counted(&stats->unassigned),
        .signals = av_counted(&stats->signals),
        .other = av_counted(&stats->other),
        .python_ns = av_counted(&stats->python_ns),
        .delays = av_counted(&stats->delays),
        .delayed_ns = av_counted(&stats->delayed_ns),
    };
}

int av_ioctl_value(int fd, unsigned long request, unsigned long value)
{
    int result = ioctl(fd, request, value);
    return result < 0 ? -errno : result;
}
