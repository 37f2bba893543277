/* What the loop does, in the place of Python. */
#include <poll.h>
#include <string.h>
#include <unistd.h>

#include "state.h"

#define REST_TIMEOUT_MS 20000 /* far more than any machine needs: a lane that hangs */

void state_start(struct state_lane *lane)
{
    for (uint32_t i = 0; i < lane->queues; i++)
        av_lane_set_kick(lane->lane, i, lane->kick_fd[i]);
    CHECK(av_lane_start(lane->lane) == 0);
}

static void take_notice(struct state_lane *lane)
{
    uint32_t notice = av_lane_notice(lane->lane);

    if (notice & AV_LANE_FAILED)
        CHECK(av_lane_error(lane->lane) < 0);
}

void state_rest(struct state_lane *lane)
{
    while (av_lane_hold(lane->lane) == 0) {
        struct pollfd notice = { .fd = av_home_notice_fd(lane->home), .events = POLLIN };
        uint64_t count;

        CHECK(poll(&notice, 1, REST_TIMEOUT_MS) == 1);
        CHECK(read(notice.fd, &count, sizeof(count)) == sizeof(count));
    }
    take_notice(lane);
}

/* The driver resets the device: at rest, all forgotten, and begun again. */
static void reset(struct state_machine *machine, struct state_lane *lane)
{
    state_rest(lane);
    if (lane->kind == STATE_NIC)
        av_net_stop(machine->nic);
    pthread_mutex_lock(&machine->drivers);
    for (uint32_t i = 0; i < lane->queues; i++)
        fuzz_queue_restart(&lane->queue[i]);
    pthread_mutex_unlock(&machine->drivers);
    if (lane->kind == STATE_NIC)
        av_net_start(machine->nic, machine->mergeable, 1514, 0);
    state_start(lane);
}

/* What a pause and a queue that comes later do; a guest may have it done at any time. */
static void pause_or_restart(struct state_machine *machine, struct state_lane *lane, uint8_t how)
{
    if (how & 1) {
        reset(machine, lane);
        return;
    }
    if (how & 2)
        state_rest(lane);
    else if (how & 4)
        av_lane_hold(lane->lane);
    state_start(lane); /* nothing when it runs */
}

static void statistics(struct state_machine *machine, struct state_lane *lane)
{
    struct av_vring_stats ring;
    struct av_home_stats home;
    struct av_blk_stats blk;
    struct av_net_stats net;
    struct av_uart_stats uart;
    struct av_cable_stats cable;

    for (uint32_t i = 0; i < lane->queues; i++) {
        av_vring_statistics(lane->queue[i].ring, &ring);
        CHECK(ring.running && av_fault_name(av_vring_fault(lane->queue[i].ring)) != NULL);
        av_interrupt_count(lane->queue[i].interrupt);
    }
    av_home_statistics(lane->home, &home);
    for (uint32_t i = 0; i < STATE_DISKS; i++)
        av_blk_statistics(machine->disk[i], &blk);
    av_net_statistics(machine->nic, &net);
    av_uart_statistics(machine->uart, &uart);
    av_cable_statistics(machine->own, &cable);
    CHECK(av_net_take_error(machine->nic) == 0);
    take_notice(lane);
}

static void set_limits(struct state_machine *machine, struct fuzz_input *in)
{
    uint8_t how = fuzz_u8(in);
    struct av_rates rates = { 0 };

    if (how & 1) {
        rates.bytes = 1u << (10 + (how >> 4));
        rates.bytes_burst = 4096;
    }
    if (how & 2) {
        rates.ops = 1u << (how >> 4);
        rates.ops_burst = 1 + (how >> 6);
    }
    av_limiter_set(machine->limiter[how >> 2 & 1], &rates);
    if (how & 8)
        for (uint32_t i = 0; i < STATE_DISKS; i++)
            CHECK(av_blk_limit(machine->disk[i], machine->limiter[0]) == 0);
    else
        CHECK(av_net_limit(machine->nic, machine->limiter[1], machine->limiter[0]) == 0);
}

static void set_disk(struct state_machine *machine, uint8_t how)
{
    struct av_blk *disk = machine->disk[how >> 7];

    if (how & 1)
        av_blk_set_writeback(disk, how >> 1 & 1);
    else
        av_blk_set_capacity(disk, STATE_SECTORS - (how >> 1 & 7));
}

static void set_nic(struct state_machine *machine, struct fuzz_input *in)
{
    struct av_net_filter filter = { .mac = { 2 }, .promisc = fuzz_u8(in) & 1 };
    uint8_t how = fuzz_u8(in);

    switch (how & 7) {
    case 0:
        av_net_set_link(machine->nic, how >> 3 & 1);
        break;
    case 1:
        av_net_set_filter(machine->nic, how & 8 ? &filter : NULL);
        break;
    case 2:
        av_net_set_offloads(machine->nic, how >> 3 & 15);
        break;
    case 3:
        av_cable_set_up(machine->peer, how >> 3 & 1);
        break;
    case 4:
        av_cable_set_patient(machine->peer, how >> 3 & 1);
        break;
    case 5:
        av_cable_set_up(machine->own, how >> 3 & 1);
        break;
    default:
        av_cable_wake(machine->own);
    }
}

/* The other end of the cable. */
static void peer(struct state_machine *machine, struct fuzz_input *in)
{
    uint8_t data[4096] = { 0 };
    uint32_t lengths[4], count = 1 + fuzz_below(in, 4);

    for (uint32_t i = 0; i < count; i++)
        lengths[i] = fuzz_u16(in) % 1024;
    if (fuzz_u8(in) & 1)
        CHECK(av_cable_send(machine->peer, NULL, data, lengths, count) >= 0);
    else
        CHECK(av_cable_take(machine->peer, data, sizeof(data), lengths, count) >= 0);
}

/* Python's half of registers that vCPUs read and write without it. */
static void registers(struct state_machine *machine, struct fuzz_input *in)
{
    uint8_t how = fuzz_u8(in), offset = fuzz_u8(in) % STATE_REGS_BYTES, size = 1 + (how >> 5);
    struct av_regs *regs = machine->regs[how & 1];
    uint64_t value = fuzz_u8(in) * 0x0101010101010101u;

    switch (how >> 1 & 7) {
    case 0:
        av_regs_put(regs, offset, size, value);
        break;
    case 1:
        av_regs_watch(regs, offset, size, value);
        break;
    case 2:
        av_regs_move(regs, value & 1 ? UINT64_MAX : STATE_REGS_GPA + 0x1000u * (value >> 1 & 3));
        break;
    case 3:
        av_regs_hand_over(regs, offset, size, value & 1);
        break;
    default:
        av_regs_get(regs, offset, size);
    }
}

static void serial(struct state_machine *machine, struct fuzz_input *in)
{
    uint8_t bytes[64] = { 0 };

    if (fuzz_u8(in) & 1)
        av_uart_put(machine->uart, bytes, sizeof(bytes));
    else
        av_uart_take(machine->uart, bytes, sizeof(bytes));
}

static void interrupts(struct state_machine *machine, struct state_lane *lane, uint8_t how)
{
    struct av_interrupt *interrupt = lane->queue[how % lane->queues].interrupt;

    if (how & 2)
        av_interrupt_set_fd(interrupt, how & 4 ? machine->irq_fd : -1);
    else if (how & 8)
        av_interrupt_raise(interrupt, 2);
    else
        av_interrupt_ack(interrupt, 3);
}

void state_loop_step(struct state_machine *machine, struct fuzz_input *in)
{
    uint32_t op = fuzz_below(in, 12);
    struct state_lane *lane = &machine->lane[fuzz_below(in, STATE_LANES)];

    switch (op) {
    case 0:
    case 1:
    case 2:
        pause_or_restart(machine, lane, fuzz_u8(in));
        break;
    case 3:
        set_limits(machine, in);
        break;
    case 4:
        set_disk(machine, fuzz_u8(in));
        break;
    case 5:
        set_nic(machine, in);
        break;
    case 6:
    case 7:
        peer(machine, in);
        break;
    case 8:
        registers(machine, in);
        break;
    case 9:
        serial(machine, in);
        break;
    case 10:
        interrupts(machine, lane, fuzz_u8(in));
        break;
    default:
        statistics(machine, lane);
    }
}
