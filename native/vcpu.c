#include "vcpu.h"

#include <errno.h>
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

#include "dispatch.h"

#define UART_PORTS 8
#define MMIO_INTERRUPT_STATUS 0x60 /* virtio 1.3 section 4.2.2 */
#define MMIO_INTERRUPT_ACK 0x64
#define PCI_ADDRESS_PORT 0xCF8 /* PCI Local Bus 3.0 section 3.2.2.3.2 */
#define PCI_DATA_PORT 0xCFC
#define PCI_PORTS 8

/* What the last exit still owes the kernel when av_vcpu_run() is called again. */
enum pending { PENDING_NONE, PENDING_PIO, PENDING_MMIO };

struct av_vcpu {
    struct kvm_run *run;
    size_t run_bytes;
    int fd;
    struct av_dispatch *dispatch;
    atomic_bool kicked;
    atomic_bool in_run;
    _Atomic pid_t tid;
    enum pending pending;
    uint32_t pio_done; /* elements of the current string access already answered */
    uint64_t left_ns;  /* when av_vcpu_run() last returned; 0: never */
    struct av_vcpu_stats stats;
};

static int kick_signal(void)
{
    return SIGRTMIN + 2;
}

static void on_kick(int number)
{
    (void)number; /* that the signal interrupts KVM_RUN is all it is for */
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
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
    atomic_store(&vcpu->kicked, true);
    __atomic_store_n(&vcpu->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
    if (atomic_load(&vcpu->in_run))
        syscall(SYS_tgkill, getpid(), atomic_load(&vcpu->tid), kick_signal());
}

static bool take_kick(struct av_vcpu *vcpu)
{
    __atomic_store_n(&vcpu->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
    return atomic_exchange(&vcpu->kicked, false);
}

static uint8_t *pio_data(struct av_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    return (uint8_t *)run + run->io.data_offset + (size_t)vcpu->pio_done * run->io.size;
}

/* An access that is Python's to answer. */
static void hand_out(struct av_exit *out, bool mmio, bool write, uint64_t location,
                     const uint8_t *data, uint32_t size)
{
    if (mmio)
        out->kind = write ? AV_EXIT_MMIO_WRITE : AV_EXIT_MMIO_READ;
    else
        out->kind = write ? AV_EXIT_PIO_WRITE : AV_EXIT_PIO_READ;
    out->location = location;
    out->size = size;
    out->value = 0;
    if (write)
        memcpy(&out->value, data, size);
}

enum answer { ANSWERED, FOR_PYTHON, UNASSIGNED };

/* An access to registers that are, in part, answered here. */
static enum answer registers(struct av_vcpu *vcpu, uint64_t gpa, bool write, uint8_t *data,
                             uint32_t size, struct av_exit *out)
{
    const struct av_dispatch *dispatch = vcpu->dispatch;
    uint32_t offset;

    for (uint32_t i = 0; i < dispatch->regs_count; i++) {
        struct av_regs *regs = dispatch->regs[i];
        if (!av_regs_at(regs, gpa, &offset))
            continue;
        if (write ? av_regs_write(regs, offset, size, data)
                  : av_regs_read(regs, offset, size, data)) {
            vcpu->stats.registers++;
            return ANSWERED;
        }
        vcpu->stats.mmio_python++;
        hand_out(out, true, write, gpa, data, size);
        return FOR_PYTHON;
    }
    return UNASSIGNED;
}

/* The ports that lead to PCI configuration space. */
static enum answer pci_port(struct av_vcpu *vcpu, bool write, uint8_t *data, struct av_exit *out)
{
    struct av_dispatch *dispatch = vcpu->dispatch;
    uint32_t port = vcpu->run->io.port, size = vcpu->run->io.size, address;

    if (port == PCI_ADDRESS_PORT && size == sizeof(address)) {
        if (write) {
            memcpy(&address, data, sizeof(address));
            atomic_store(&dispatch->pci_address, address);
        } else {
            address = atomic_load(&dispatch->pci_address);
            memcpy(data, &address, sizeof(address));
        }
        vcpu->stats.registers++;
        return ANSWERED;
    }
    address = atomic_load(&dispatch->pci_address);
    if (port < PCI_DATA_PORT || address >> 24 != 0x80)
        return UNASSIGNED;
    /* Bus, device and function are 4 bits further up in the memory-mapped address. */
    return registers(vcpu, dispatch->ecam + ((uint64_t)(address & 0xffff00) << 4 |
                                             (address & 0xfc) | (port & 3)),
                     write, data, size, out);
}

/* One element of a port access; true when Python has to see it. */
static bool pio_element(struct av_vcpu *vcpu, struct av_exit *out)
{
    const struct av_dispatch *dispatch = vcpu->dispatch;
    struct kvm_run *run = vcpu->run;
    uint8_t *data = pio_data(vcpu);
    bool write = run->io.direction == KVM_EXIT_IO_OUT;
    uint64_t offset = run->io.port - dispatch->uart_port;
    uint32_t pci_port_offset = (uint32_t)run->io.port - PCI_ADDRESS_PORT;
    enum answer answer;

    if (dispatch->uart != NULL && offset < UART_PORTS && run->io.size == 1) {
        vcpu->stats.uart++;
        if (!write) {
            *data = (uint8_t)av_uart_read(dispatch->uart, (uint32_t)offset);
            return false;
        }
        if (av_uart_write(dispatch->uart, (uint32_t)offset, *data) == 0)
            return false;
        out->kind = AV_EXIT_UART_FULL;
        return true;
    }
    if (dispatch->ecam_bytes != 0 && pci_port_offset < PCI_PORTS) {
        answer = pci_port(vcpu, write, data, out);
        if (answer != UNASSIGNED)
            return answer == FOR_PYTHON;
    }
    if (!av_range_table_has(&dispatch->pio, run->io.port)) {
        vcpu->stats.unassigned++;
        if (!write)
            memset(data, 0xff, run->io.size);
        return false;
    }
    vcpu->stats.pio_python++;
    hand_out(out, false, write, run->io.port, data, run->io.size);
    return true;
}

/* The elements of a port access that are left; true when Python has to see the next. */
static bool pio_go_on(struct av_vcpu *vcpu, struct av_exit *out)
{
    for (; vcpu->pio_done < vcpu->run->io.count; vcpu->pio_done++) {
        if (pio_element(vcpu, out)) {
            vcpu->pending = PENDING_PIO;
            return true;
        }
    }
    vcpu->pending = PENDING_NONE;
    return false;
}

static bool mmio_interrupt(struct av_vcpu *vcpu, struct av_interrupt *interrupt, uint64_t offset)
{
    struct kvm_run *run = vcpu->run;
    uint32_t value;

    if (run->mmio.len != sizeof(value))
        return false;
    if (offset == MMIO_INTERRUPT_STATUS && !run->mmio.is_write) {
        value = av_interrupt_status(interrupt);
        memcpy(run->mmio.data, &value, sizeof(value));
    } else if (offset == MMIO_INTERRUPT_ACK && run->mmio.is_write) {
        memcpy(&value, run->mmio.data, sizeof(value));
        av_interrupt_ack(interrupt, value);
    } else {
        return false;
    }
    vcpu->stats.interrupt++;
    return true;
}

/* A memory access outside RAM; true when Python has to see it. */
static bool mmio_exit(struct av_vcpu *vcpu, struct av_exit *out)
{
    const struct av_dispatch *dispatch = vcpu->dispatch;
    struct kvm_run *run = vcpu->run;
    uint64_t gpa = run->mmio.phys_addr;
    enum answer answer;

    for (uint32_t i = 0; i < dispatch->interrupts; i++) {
        uint64_t offset = gpa - dispatch->interrupt[i].mmio_base;
        if (offset == MMIO_INTERRUPT_STATUS || offset == MMIO_INTERRUPT_ACK) {
            if (mmio_interrupt(vcpu, dispatch->interrupt[i].interrupt, offset))
                return false;
            break;
        }
    }
    answer = registers(vcpu, gpa, run->mmio.is_write, run->mmio.data, run->mmio.len, out);
    if (answer == ANSWERED)
        return false;
    if (answer == FOR_PYTHON) {
        vcpu->pending = PENDING_MMIO;
        return true;
    }
    if (gpa - dispatch->ecam < dispatch->ecam_bytes ||
        !av_range_table_has(&dispatch->mmio, gpa)) {
        vcpu->stats.unassigned++;
        if (!run->mmio.is_write)
            memset(run->mmio.data, 0xff, sizeof(run->mmio.data));
        return false;
    }
    vcpu->stats.mmio_python++;
    hand_out(out, true, run->mmio.is_write, gpa, run->mmio.data, run->mmio.len);
    vcpu->pending = PENDING_MMIO;
    return true;
}

/* Exits that end or park the vCPU, in av_exit's words. */
static void final_exit(struct av_vcpu *vcpu, struct av_exit *out)
{
    const struct kvm_run *run = vcpu->run;

    vcpu->stats.other++;
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
            memcpy(pio_data(vcpu), &exit->value, run->io.size);
        /* A byte the full UART did not take is offered again. */
        if (exit->kind != AV_EXIT_UART_FULL)
            vcpu->pio_done++;
        return pio_go_on(vcpu, exit);
    }
    return false;
}

/* One KVM_RUN and its exit; 1 when *exit is for Python, 0 to go on, or -errno. */
static int run_once(struct av_vcpu *vcpu, struct av_exit *exit)
{
    if (ioctl(vcpu->fd, KVM_RUN, 0) != 0) {
        if (errno != EINTR && errno != EAGAIN)
            return -errno;
        vcpu->stats.signals++;
        if (!take_kick(vcpu))
            return 0;
        exit->kind = AV_EXIT_KICKED;
        return 1;
    }
    switch (vcpu->run->exit_reason) {
    case KVM_EXIT_IO:
        vcpu->pio_done = 0;
        return pio_go_on(vcpu, exit);
    case KVM_EXIT_MMIO:
        return mmio_exit(vcpu, exit);
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
        vcpu->stats.python_ns += now_ns() - vcpu->left_ns;
    result = settle(vcpu, exit);
    if (result == 0) {
        atomic_store(&vcpu->tid, tid);
        atomic_store(&vcpu->in_run, true);
        do {
            result = run_once(vcpu, exit);
        } while (result == 0);
        atomic_store(&vcpu->in_run, false);
    }
    vcpu->left_ns = now_ns();
    return result < 0 ? result : 0;
}

void av_vcpu_statistics(const struct av_vcpu *vcpu, struct av_vcpu_stats *out)
{
    /* Word-sized counters of another thread: each is exact, their sum is a moment's picture. */
    *out = vcpu->stats;
}

int av_ioctl_value(int fd, unsigned long request, unsigned long value)
{
    int result = ioctl(fd, request, value);
    return result < 0 ? -errno : result;
}
