/* What is not listed kills the process: a worker that asks for it is not ours any more. Calls by
 * which libraries look for files that may be missing fail instead, and there are none to be found.
 */
#define _GNU_SOURCE
#include "walls_filter.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/fs.h>
#include <linux/if_tun.h>
#include <linux/kvm.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef __x86_64__
#error "the lists are x86-64's"
#endif

#define X32_BIT 0x40000000u
#define CODE_MAX 512
#define COUNT(a) (sizeof(a) / sizeof((a)[0]))

enum {
    BUILD = 1 << AV_ROLE_BUILD,
    LOOP = 1 << AV_ROLE_LOOP,
    VCPU = 1 << AV_ROLE_VCPU,
    IO = 1 << AV_ROLE_IO,
    /* Memory, locks, clocks: what C and Python need to live. */
    ALL = BUILD | LOOP | VCPU | IO,
    MAIN = BUILD | LOOP,
    DATA = BUILD | LOOP | IO,
};

/* A system call that a thread may make whatever its arguments. */
struct plain {
    uint16_t nr;
    uint16_t roles;
};

static const struct plain plain[] = {
    {SYS_futex, ALL},
    {SYS_read, ALL},
    {SYS_write, ALL},
    {SYS_epoll_wait, DATA},
    {SYS_epoll_pwait, DATA},
    {SYS_io_uring_enter, DATA},
    {SYS_preadv, DATA},
    {SYS_pwritev, DATA},
    {SYS_fdatasync, DATA},
    {SYS_fallocate, DATA},
    {SYS_timerfd_settime, DATA},
    {SYS_epoll_ctl, DATA},
    {SYS_getrandom, ALL},
    {SYS_clock_gettime, ALL},
    {SYS_clock_nanosleep, ALL},
    {SYS_gettimeofday, ALL},
    {SYS_time, ALL},
    {SYS_sched_yield, ALL},
    {SYS_rt_sigreturn, ALL},
    {SYS_rt_sigprocmask, ALL},
    {SYS_restart_syscall, ALL},
    {SYS_munmap, ALL},
    {SYS_madvise, ALL},
    {SYS_brk, ALL},
    {SYS_mremap, ALL},
    {SYS_exit, ALL},
    {SYS_exit_group, ALL},
    {SYS_gettid, ALL},
    {SYS_getpid, ALL},
    {SYS_readv, DATA},
    {SYS_writev, DATA},
    {SYS_close, DATA},
    {SYS_poll, MAIN},
    {SYS_fstat, MAIN},
    {SYS_lseek, MAIN},
    {SYS_eventfd2, MAIN},
    {SYS_timerfd_create, MAIN},
    {SYS_set_robust_list, MAIN},
    {SYS_rseq, MAIN},
    {SYS_rt_sigaction, MAIN},
    {SYS_sigaltstack, MAIN},
    {SYS_sched_getaffinity, MAIN},
    {SYS_shutdown, DATA},
    /* Sockets of a vsock's connections, from the program. Nothing sends any. */
    {SYS_recvmsg, MAIN},
    {SYS_io_uring_register, MAIN},
    {SYS_io_uring_setup, BUILD},
    {SYS_epoll_create1, BUILD},
    {SYS_memfd_create, BUILD},
    {SYS_ftruncate, BUILD},
    {SYS_sysinfo, BUILD},
    {SYS_fstatfs, BUILD},
    {SYS_getsockopt, BUILD},
    {SYS_getsockname, BUILD},
    {SYS_pipe2, BUILD},
};

/* A call that is refused and does no harm: the usual answer where there is nothing. */
struct refused {
    uint16_t nr;
    uint16_t error;
};

static const struct refused refused[] = {
    {SYS_open, EACCES},      {SYS_openat, EACCES},     {SYS_openat2, EACCES}, {SYS_stat, EACCES},
    {SYS_lstat, EACCES},     {SYS_access, EACCES},     {SYS_statx, EACCES},   {SYS_readlink, EACCES},
    {SYS_readlinkat, EACCES}, {SYS_getcwd, EACCES},
    /* Its arguments are in memory, where no filter can see them; the C library does without. */
    {SYS_clone3, ENOSYS},
};

/* A call that depends on one argument. */
enum test {
    ONE_OF,   /* it is one of the values */
    NONE_OF,  /* it has none of these bits */
    SOME_OF,  /* it has one of these bits; else the call fails */
    OWN_PID,  /* it is this process */
    NO_FLAGS, /* it is one of the values, but for one bit that means nothing */
};

struct tested {
    uint16_t nr;
    uint16_t roles;
    uint8_t argument;
    uint8_t test;
    uint8_t count;
    const uint32_t *values;
};

#define VALUES(name, ...) static const uint32_t name[] = {__VA_ARGS__}

VALUES(vcpu_ioctls, KVM_RUN, (uint32_t)KVM_IOEVENTFD);
VALUES(loop_ioctls, (uint32_t)KVM_IRQFD, (uint32_t)KVM_SET_GSI_ROUTING, FIONBIO,
       (uint32_t)TUNSETOFFLOAD, (uint32_t)TUNSETQUEUE, (uint32_t)TUNSETCARRIER);
VALUES(build_ioctls, KVM_GET_API_VERSION, KVM_CHECK_EXTENSION, KVM_CREATE_VM,
       KVM_GET_VCPU_MMAP_SIZE, (uint32_t)KVM_GET_SUPPORTED_CPUID, (uint32_t)KVM_SET_CPUID2,
       (uint32_t)KVM_GET_REGS, (uint32_t)KVM_SET_REGS, (uint32_t)KVM_GET_SREGS,
       (uint32_t)KVM_SET_SREGS, (uint32_t)KVM_SET_MSRS, (uint32_t)KVM_GET_LAPIC,
       (uint32_t)KVM_SET_LAPIC, (uint32_t)KVM_GET_MP_STATE, (uint32_t)KVM_SET_USER_MEMORY_REGION,
       KVM_CREATE_IRQCHIP, (uint32_t)KVM_CREATE_PIT2, KVM_SET_TSS_ADDR,
       (uint32_t)KVM_SET_IDENTITY_MAP_ADDR, KVM_CREATE_VCPU, (uint32_t)BLKGETSIZE64, BLKPBSZGET,
       BLKIOMIN, BLKIOOPT, BLKALIGNOFF);
VALUES(executable, PROT_EXEC);
/* glibc's pthread_create(); musl's has one bit more. */
VALUES(thread_flags, CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SYSVSEM | CLONE_SIGHAND |
                         CLONE_THREAD | CLONE_SETTLS | CLONE_PARENT_SETTID | CLONE_CHILD_CLEARTID);
VALUES(thread_names, PR_SET_NAME);
VALUES(open_files, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, 37 /* F_OFD_SETLK */);
VALUES(stricter, SECCOMP_SET_MODE_FILTER);
VALUES(empty_path, AT_EMPTY_PATH);

static const struct tested tested[] = {
    {SYS_ioctl, BUILD | VCPU, 1, ONE_OF, COUNT(vcpu_ioctls), vcpu_ioctls},
    {SYS_ioctl, MAIN, 1, ONE_OF, COUNT(loop_ioctls), loop_ioctls},
    {SYS_ioctl, BUILD, 1, ONE_OF, COUNT(build_ioctls), build_ioctls},
    {SYS_mmap, ALL, 2, NONE_OF, COUNT(executable), executable},
    {SYS_mprotect, ALL, 2, NONE_OF, COUNT(executable), executable},
    {SYS_clone, MAIN, 0, NO_FLAGS, COUNT(thread_flags), thread_flags},
    {SYS_tgkill, ALL, 0, OWN_PID, 0, NULL},
    {SYS_prctl, ALL, 0, ONE_OF, COUNT(thread_names), thread_names},
    {SYS_fcntl, MAIN, 1, ONE_OF, COUNT(open_files), open_files},
    {SYS_seccomp, MAIN, 0, ONE_OF, COUNT(stricter), stricter},
    {SYS_newfstatat, MAIN, 3, SOME_OF, COUNT(empty_path), empty_path},
};

struct code {
    struct sock_filter at[CODE_MAX];
    unsigned count;
};

static void emit(struct code *code, uint16_t op, uint8_t yes, uint8_t no, uint32_t value)
{
    /* Counted on when it is full, so that it is seen; the lists are ours and fit. */
    if (code->count < CODE_MAX)
        code->at[code->count] = (struct sock_filter)BPF_JUMP(op, value, yes, no);
    code->count++;
}

#define LOAD (BPF_LD | BPF_W | BPF_ABS)
#define EQUAL (BPF_JMP | BPF_JEQ | BPF_K)
#define BITS (BPF_JMP | BPF_JSET | BPF_K)
#define MASK (BPF_ALU | BPF_AND | BPF_K)
#define ANSWER (BPF_RET | BPF_K)
#define REFUSE(error) (SECCOMP_RET_ERRNO | ((error) & SECCOMP_RET_DATA))

static void load_nr(struct code *code)
{
    emit(code, LOAD, 0, 0, offsetof(struct seccomp_data, nr));
}

/* Little endian: the low word comes first. All these arguments are int or unsigned to the kernel,
 * which looks at that word alone; mmap()'s and clone()'s flags have no bit beyond it. */
static void load_argument(struct code *code, uint8_t argument)
{
    emit(code, LOAD, 0, 0, offsetof(struct seccomp_data, args) + 8u * argument);
}

/* Falls through with the number loaded again when the call is another one, or this does not decide
 * about it. */
static void emit_tested(struct code *code, const struct tested *rule)
{
    unsigned begin = code->count;

    emit(code, EQUAL, 0, 0, rule->nr); /* its jump is set below */
    load_argument(code, rule->argument);
    switch ((enum test)rule->test) {
    case NO_FLAGS:
        emit(code, MASK, 0, 0, ~(uint32_t)CLONE_DETACHED);
        /* fall through */
    case ONE_OF:
        for (unsigned i = 0; i < rule->count; i++) {
            emit(code, EQUAL, 0, 1, rule->values[i]);
            emit(code, ANSWER, 0, 0, SECCOMP_RET_ALLOW);
        }
        break;
    case OWN_PID:
        emit(code, EQUAL, 0, 1, (uint32_t)getpid());
        emit(code, ANSWER, 0, 0, SECCOMP_RET_ALLOW);
        break;
    case NONE_OF:
        emit(code, BITS, 1, 0, rule->values[0]);
        emit(code, ANSWER, 0, 0, SECCOMP_RET_ALLOW);
        break;
    case SOME_OF:
        emit(code, BITS, 0, 1, rule->values[0]);
        emit(code, ANSWER, 0, 0, SECCOMP_RET_ALLOW);
        emit(code, ANSWER, 0, 0, REFUSE(EACCES));
        break;
    }
    load_nr(code);
    /* An offset of a jump is 8 bits; the longest list has half as many. */
    code->at[begin].jf = (uint8_t)(code->count - begin - 1);
}

static int assemble(struct code *code, unsigned role)
{
    emit(code, LOAD, 0, 0, offsetof(struct seccomp_data, arch));
    emit(code, EQUAL, 1, 0, AUDIT_ARCH_X86_64);
    emit(code, ANSWER, 0, 0, SECCOMP_RET_KILL_PROCESS);
    load_nr(code);
    emit(code, BPF_JMP | BPF_JGE | BPF_K, 0, 1, X32_BIT);
    emit(code, ANSWER, 0, 0, SECCOMP_RET_KILL_PROCESS);
    for (size_t i = 0; i < COUNT(tested); i++)
        if (tested[i].roles & role)
            emit_tested(code, &tested[i]);
    for (size_t i = 0; i < COUNT(plain); i++)
        if (plain[i].roles & role) {
            emit(code, EQUAL, 0, 1, plain[i].nr);
            emit(code, ANSWER, 0, 0, SECCOMP_RET_ALLOW);
        }
    for (size_t i = 0; i < COUNT(refused); i++) {
        emit(code, EQUAL, 0, 1, refused[i].nr);
        emit(code, ANSWER, 0, 0, REFUSE(refused[i].error));
    }
    emit(code, ANSWER, 0, 0, SECCOMP_RET_KILL_PROCESS);
    return code->count <= CODE_MAX ? 0 : -E2BIG;
}

int av_walls_install(enum av_role role)
{
    struct code code;
    struct sock_fprog program;
    int result;

    code.count = 0;
    result = assemble(&code, 1u << role);
    if (result < 0)
        return result;
    program.len = (unsigned short)code.count;
    program.filter = code.at;
    return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) < 0 ? -errno : 0;
}
