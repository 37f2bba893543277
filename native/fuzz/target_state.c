/* Whole devices while their I/O threads run: hostile drivers on two vCPUs, and resets, pauses and
 * changes by the loop. */
#define _GNU_SOURCE /* memfd_create */
#include "state.h"

#include <fcntl.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define DEPTH 4u
#define QUEUE_BYTES 16384u
#define POLL_NS 20000u
#define UART_PORT 0x3f8u

static int new_eventfd(void)
{
    int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

    CHECK(fd >= 0);
    return fd;
}

static void create_homes(struct state_machine *machine, uint8_t how)
{
    int error;

    for (uint32_t i = 0; i < STATE_HOMES; i++) {
        machine->home[i] = av_home_create(&error);
        CHECK(machine->home[i] != NULL);
        CHECK(av_home_start_thread(machine->home[i], how >> i & 1 ? POLL_NS : 0) == 0);
    }
}

/* The queues of one lane, in memory of their own; its device comes next. */
static struct state_lane *create_queues(struct state_machine *machine, uint32_t index,
                                        enum state_kind kind, struct fuzz_input *in, uint8_t how)
{
    struct state_lane *lane = &machine->lane[index];

    lane->kind = kind;
    lane->home = machine->home[index % STATE_HOMES];
    lane->queues = kind == STATE_NIC ? 2 : 1;
    fuzz_guest_init(&lane->guest);
    for (uint32_t i = 0; i < lane->queues; i++) {
        fuzz_queue_init(&lane->queue[i], &lane->guest, in, how >> index & 1);
        lane->kick_fd[i] = new_eventfd();
        av_interrupt_set_fd(lane->queue[i].interrupt, machine->irq_fd);
    }
    lane->data_gpa = fuzz_guest_add_data(&lane->guest, STATE_DATA_BYTES);
    return lane;
}

static void create_disks(struct state_machine *machine, struct fuzz_input *in, uint8_t how)
{
    struct av_blk_config config = {
        .fd = machine->file_fd,
        .capacity_sectors = STATE_SECTORS,
        .discard = 1,
        .write_zeroes = 1,
        .writeback = 1,
        .alignment_bytes = how & 1 ? 512 : 1,
        .copy_max_bytes = 1024,
        .lost = &machine->lost_errno,
        .seg_max = 4,
        .depth = DEPTH,
        .engine = how & 2 ? AV_BLK_IO_URING : AV_BLK_THREADS,
        .workers = 2,
    };
    int error;

    for (uint32_t i = 0; i < STATE_DISKS; i++) {
        struct state_lane *lane = create_queues(machine, i, STATE_DISK, in, how >> 2);

        machine->disk[i] = av_blk_create(&config, lane->home, lane->queue[0].ring, &error);
        if (machine->disk[i] == NULL) { /* a host that refuses io_uring */
            config.engine = AV_BLK_THREADS;
            machine->disk[i] = av_blk_create(&config, lane->home, lane->queue[0].ring, &error);
        }
        CHECK(machine->disk[i] != NULL);
        lane->lane = av_blk_lane(machine->disk[i]);
        if (how & 0x80)
            CHECK(av_blk_pin(machine->disk[i], &lane->guest.mem) <= 0);
    }
}

static void create_others(struct state_machine *machine, struct fuzz_input *in, uint8_t how)
{
    struct state_lane *nic = create_queues(machine, STATE_DISKS, STATE_NIC, in, how);
    struct state_lane *rng = create_queues(machine, STATE_DISKS + 1, STATE_RNG, in, how);
    int error;

    machine->mergeable = how >> 4 & 1;
    machine->cable = av_cable_create(QUEUE_BYTES, &error);
    CHECK(machine->cable != NULL);
    machine->own = av_cable_end(machine->cable, 0);
    machine->peer = av_cable_end(machine->cable, 1);
    av_cable_set_up(machine->own, 1);
    av_cable_set_up(machine->peer, 1);
    av_cable_watch(machine->own, machine->wire_fd);
    machine->nic = av_net_create(nic->home, machine->wire_fd, machine->own, nic->queue[0].ring,
                                 nic->queue[1].ring, &error);
    machine->rng = av_rng_create(rng->home, rng->queue[0].ring, &error);
    CHECK(machine->nic != NULL && machine->rng != NULL);
    nic->lane = av_net_lane(machine->nic);
    rng->lane = av_rng_lane(machine->rng);
    av_net_start(machine->nic, machine->mergeable, 1514, 0);
}

static void create_registers(struct state_machine *machine)
{
    machine->dispatch = av_dispatch_create();
    machine->uart = av_uart_create(machine->irq_fd, machine->irq_fd);
    CHECK(machine->dispatch != NULL && machine->uart != NULL);
    CHECK(av_dispatch_add_uart(machine->dispatch, UART_PORT, machine->uart) == 0);
    CHECK(av_dispatch_add_mmio(machine->dispatch, STATE_MMIO_GPA, 0x1000) == 0);
    CHECK(av_dispatch_add_interrupt(machine->dispatch, STATE_MMIO_GPA,
                                    machine->lane[0].queue[0].interrupt) == 0);
    for (uint32_t i = 0; i < STATE_REGS; i++) {
        machine->regs[i] = av_regs_create(STATE_REGS_BYTES);
        CHECK(machine->regs[i] != NULL);
        for (uint32_t at = 0; at < STATE_REGS_BYTES; at += 8)
            av_regs_define(machine->regs[i], at, 8, 0, UINT64_MAX);
        av_regs_move(machine->regs[i], STATE_REGS_GPA + 0x1000u * i);
        CHECK(av_dispatch_add_regs(machine->dispatch, machine->regs[i]) == 0);
    }
}

static void create(struct state_machine *machine, struct fuzz_input *in)
{
    uint8_t how = fuzz_u8(in), kinds = fuzz_u8(in);

    pthread_mutex_init(&machine->drivers, NULL);
    machine->file_fd = memfd_create("state", MFD_CLOEXEC);
    machine->wire_fd = new_eventfd();
    machine->irq_fd = new_eventfd();
    CHECK(machine->file_fd >= 0);
    CHECK(ftruncate(machine->file_fd, (off_t)STATE_SECTORS * AV_BLK_SECTOR_BYTES) == 0);
    create_homes(machine, how);
    create_disks(machine, in, kinds);
    create_others(machine, in, how >> 2);
    create_registers(machine);
    for (uint32_t i = 0; i < 2; i++) {
        machine->limiter[i] = av_limiter_create();
        CHECK(machine->limiter[i] != NULL);
    }
    for (uint32_t i = 0; i < STATE_LANES; i++)
        state_start(&machine->lane[i]);
}

/* Nothing was taken and kept, but for one chain that broke its ring. */
static void check_rest(const struct state_machine *machine)
{
    for (uint32_t i = 0; i < STATE_DISKS; i++) {
        CHECK(machine->disk[i]->in_flight == 0);
        CHECK(!av_holds(&machine->disk[i]->hold));
    }
    for (uint32_t i = 0; i < STATE_LANES; i++)
        CHECK(!machine->lane[i].lane->registered && !machine->lane[i].lane->taking);
}

static void destroy(struct state_machine *machine)
{
    av_net_stop(machine->nic);
    for (uint32_t i = 0; i < STATE_DISKS; i++) {
        av_blk_unpin(machine->disk[i]);
        av_blk_destroy(machine->disk[i]);
    }
    av_net_destroy(machine->nic);
    av_rng_destroy(machine->rng);
    for (uint32_t i = 0; i < STATE_HOMES; i++)
        av_home_destroy(machine->home[i]);
    av_cable_destroy(machine->cable);
    for (uint32_t i = 0; i < STATE_LANES; i++) {
        for (uint32_t j = 0; j < machine->lane[i].queues; j++) {
            fuzz_queue_fini(&machine->lane[i].queue[j]);
            close(machine->lane[i].kick_fd[j]);
        }
        fuzz_guest_fini(&machine->lane[i].guest);
    }
    for (uint32_t i = 0; i < 2; i++) {
        av_limiter_destroy(machine->limiter[i]);
        av_regs_destroy(machine->regs[i]);
    }
    av_dispatch_destroy(machine->dispatch);
    av_uart_destroy(machine->uart);
    close(machine->file_fd);
    close(machine->wire_fd);
    close(machine->irq_fd);
    pthread_mutex_destroy(&machine->drivers);
}

static void *run_vcpu(void *argument)
{
    struct state_vcpu *vcpu = argument;

    while (fuzz_more(&vcpu->in))
        state_guest_step(vcpu);
    return NULL;
}

/* The next part of the input, of those that are left. */
static struct fuzz_input part_of(struct fuzz_input *in, size_t parts)
{
    struct fuzz_input part = { in->at, in->left / parts };

    in->at += part.left;
    in->left -= part.left;
    return part;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input in = { data, size };
    struct state_machine machine = { 0 };
    struct state_vcpu vcpu[STATE_VCPUS] = { 0 };

    create(&machine, &in);
    for (uint32_t i = 0; i < STATE_VCPUS; i++) {
        vcpu[i].machine = &machine;
        vcpu[i].vcpu = (struct av_vcpu){ .fd = -1, .dispatch = machine.dispatch };
        vcpu[i].in = part_of(&in, STATE_VCPUS + 1 - i);
        CHECK(pthread_create(&vcpu[i].thread, NULL, run_vcpu, &vcpu[i]) == 0);
    }
    while (fuzz_more(&in)) {
        struct av_vcpu_stats stats;

        state_loop_step(&machine, &in);
        av_vcpu_statistics(&vcpu[0].vcpu, &stats);
    }
    for (uint32_t i = 0; i < STATE_VCPUS; i++)
        CHECK(pthread_join(vcpu[i].thread, NULL) == 0);
    for (uint32_t i = 0; i < STATE_LANES; i++)
        state_rest(&machine.lane[i]);
    check_rest(&machine);
    destroy(&machine);
    return 0;
}
