/* What vCPUs do. */
#include <string.h>
#include <unistd.h>

#include "state.h"

static void kick(const struct state_lane *lane, uint32_t queue)
{
    uint64_t one = 1;

    CHECK(write(lane->kick_fd[queue], &one, sizeof(one)) == sizeof(one));
}

/* A disk request of sense: header, data, status. */
static void offer_request(struct state_lane *lane, struct fuzz_input *in)
{
    static const uint32_t types[] = { AV_BLK_T_IN,     AV_BLK_T_OUT,     AV_BLK_T_FLUSH,
                                      AV_BLK_T_GET_ID, AV_BLK_T_DISCARD, AV_BLK_T_WRITE_ZEROES };
    uint32_t type = types[fuzz_below(in, 6)], bytes = fuzz_below(in, 3) * 512u;
    uint64_t sector = fuzz_below(in, STATE_SECTORS + 2), gpa = lane->data_gpa;
    uint8_t *header = av_gmem_hva(&lane->guest.mem, gpa, 16);
    bool reads = type == AV_BLK_T_IN || type == AV_BLK_T_GET_ID;
    struct av_desc segment[3] = { fuzz_segment(gpa, 16, 0),
                                  fuzz_segment(gpa + 16 + fuzz_u8(in), bytes,
                                               reads ? AV_DESC_WRITE : 0),
                                  fuzz_segment(gpa + STATE_DATA_BYTES - 1, 1, AV_DESC_WRITE) };

    memcpy(header, &type, sizeof(type));
    memcpy(header + 8, &sector, sizeof(sector));
    if (bytes == 0)
        segment[1] = segment[2];
    fuzz_queue_offer(&lane->queue[0], segment, bytes == 0 ? 2 : 3);
}

static void offer_buffer(struct state_lane *lane, uint32_t queue, struct fuzz_input *in)
{
    uint32_t at = fuzz_u8(in), bytes = 1 + fuzz_u16(in) % (STATE_DATA_BYTES - at);
    bool room = lane->kind == STATE_RNG || queue == 0;
    struct av_desc segment = fuzz_segment(lane->data_gpa + at, bytes, room ? AV_DESC_WRITE : 0);

    fuzz_queue_offer(&lane->queue[queue], &segment, 1);
}

static void drive(struct state_vcpu *vcpu)
{
    struct fuzz_input *in = &vcpu->in;
    struct state_lane *lane = &vcpu->machine->lane[fuzz_below(in, STATE_LANES)];
    uint32_t queue = fuzz_u8(in) % lane->queues, how = fuzz_below(in, 8);

    pthread_mutex_lock(&vcpu->machine->drivers);
    if (how == 0)
        fuzz_queue_step(&lane->queue[queue], in);
    else if (how == 1)
        fuzz_guest_scribble(&lane->guest, in);
    else if (lane->kind == STATE_DISK)
        offer_request(lane, in);
    else
        offer_buffer(lane, queue, in);
    pthread_mutex_unlock(&vcpu->machine->drivers);
    if (how & 2)
        kick(lane, queue);
}

/* Registers, interrupt status and acknowledgement; what is Python's comes to nothing here. */
static void mmio(struct state_vcpu *vcpu)
{
    struct fuzz_input *in = &vcpu->in;
    struct kvm_run run = { 0 };
    struct av_exit exit = { 0 };
    uint8_t how = fuzz_u8(in);
    uint64_t page = STATE_REGS_GPA + 0x1000u * (how >> 6);

    run.mmio.phys_addr = how & 0x20 ? STATE_MMIO_GPA + 0x60 + (how >> 6) * 4u
                                    : page + fuzz_u8(in) % STATE_REGS_BYTES;
    run.mmio.len = how & 0x20 ? 4 : 1 + (how & 7);
    run.mmio.is_write = how >> 3 & 1;
    fuzz_bytes(in, run.mmio.data, 8);
    vcpu->vcpu.run = &run;
    av_vcpu_mmio_exit(&vcpu->vcpu, &exit);
    vcpu->vcpu.run = NULL;
}

static void pio(struct state_vcpu *vcpu)
{
    struct fuzz_input *in = &vcpu->in;
    struct {
        struct kvm_run run;
        uint8_t data[4];
    } access = { 0 };
    struct av_exit exit = { 0 };
    uint8_t how = fuzz_u8(in);

    access.run.io.direction = how & 8 ? KVM_EXIT_IO_OUT : KVM_EXIT_IO_IN;
    access.run.io.size = 1;
    access.run.io.port = (uint16_t)(0x3f8 + (how & 7));
    access.run.io.count = 1;
    access.run.io.data_offset = sizeof(access.run);
    access.data[0] = fuzz_u8(in);
    vcpu->vcpu.run = &access.run;
    vcpu->vcpu.pio_done = 0;
    av_vcpu_pio_go_on(&vcpu->vcpu, &exit);
    vcpu->vcpu.run = NULL;
}

void state_guest_step(struct state_vcpu *vcpu)
{
    uint32_t op = fuzz_below(&vcpu->in, 8);

    if (op < 6)
        drive(vcpu);
    else if (op == 6)
        mmio(vcpu);
    else
        pio(vcpu);
}
