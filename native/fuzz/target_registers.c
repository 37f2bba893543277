/* What a vCPU's port and memory accesses reach without Python: the UART, the clock, PCI
 * configuration space by ports and by memory, virtio-mmio's interrupt registers. */
#include <string.h>

#include "fuzz.h"
#include "host.h"
#include "vcpu_internal.h"

#define ECAM_GPA 0xe0000000u
#define ECAM_BYTES 0x100000u
#define MSIX_GPA 0xd0000000u
#define MMIO_GPA 0xd1000000u
#define CONFIG_BYTES 64u
#define ELEMENTS_MAX 8u

struct machine {
    struct av_dispatch *dispatch;
    struct av_uart *uart;
    struct av_rtc *rtc;
    struct av_interrupt *interrupt;
    struct av_regs *regs[2];
    uint64_t writable[2][CONFIG_BYTES / 8]; /* of regs, and what is watched of that */
    uint64_t watched[2][CONFIG_BYTES / 8];
    struct av_vcpu vcpu;
    uint64_t from_host, to_host; /* bytes through the UART */
};

static const uint64_t regs_gpa[] = { ECAM_GPA + (1u << 15), MSIX_GPA };

static void define(struct machine *machine, uint32_t block, struct fuzz_input *in)
{
    struct av_regs *regs = av_regs_create(CONFIG_BYTES);

    CHECK(regs != NULL);
    machine->regs[block] = regs;
    for (uint32_t i = 0; i < CONFIG_BYTES / 8; i++) {
        uint64_t value = fuzz_u8(in) * 0x0101010101010101u;
        uint8_t bits = fuzz_u8(in);

        machine->writable[block][i] = (bits & 15) * 0x1111111111111111u;
        machine->watched[block][i] = (bits >> 4) * 0x1001001001001001u;
        av_regs_define(regs, 8 * i, 8, value, machine->writable[block][i]);
        av_regs_watch(regs, 8 * i, 8, machine->watched[block][i]);
    }
    av_regs_hand_over(regs, fuzz_u8(in), 1 + fuzz_below(in, 8), fuzz_u8(in) & 1);
    av_regs_move(regs, regs_gpa[block]);
    CHECK(av_dispatch_add_regs(machine->dispatch, regs) == 0);
}

static void create(struct machine *machine, struct fuzz_input *in)
{
    machine->dispatch = av_dispatch_create();
    machine->uart = av_uart_create(-1, -1);
    machine->rtc = av_rtc_create();
    machine->interrupt = av_interrupt_create(-1);
    CHECK(machine->dispatch && machine->uart && machine->rtc && machine->interrupt);
    CHECK(av_dispatch_add_uart(machine->dispatch, 0x3f8, machine->uart) == 0);
    CHECK(av_dispatch_add_rtc(machine->dispatch, 0x70, machine->rtc) == 0);
    CHECK(av_dispatch_add_pio(machine->dispatch, 0x600, 4) == 0);
    CHECK(av_dispatch_add_mmio(machine->dispatch, MMIO_GPA, 0x1000) == 0);
    CHECK(av_dispatch_add_interrupt(machine->dispatch, MMIO_GPA, machine->interrupt) == 0);
    av_dispatch_set_ecam(machine->dispatch, ECAM_GPA, ECAM_BYTES);
    define(machine, 0, in);
    define(machine, 1, in);
    machine->vcpu = (struct av_vcpu){ .fd = -1, .dispatch = machine->dispatch };
}

static void destroy(struct machine *machine)
{
    av_dispatch_destroy(machine->dispatch);
    av_uart_destroy(machine->uart);
    av_rtc_destroy(machine->rtc);
    av_interrupt_destroy(machine->interrupt);
    av_regs_destroy(machine->regs[0]);
    av_regs_destroy(machine->regs[1]);
}

struct values {
    uint64_t of[2][CONFIG_BYTES / 8];
};

static struct values values_of(const struct machine *machine)
{
    struct values values;

    for (uint32_t block = 0; block < 2; block++)
        for (uint32_t i = 0; i < CONFIG_BYTES / 8; i++)
            values.of[block][i] = av_regs_get(machine->regs[block], 8 * i, 8);
    return values;
}

/* No guest changes what is constant, nor by itself what is watched. */
static void check(const struct machine *machine, const struct values *before)
{
    struct values after = values_of(machine);

    for (uint32_t block = 0; block < 2; block++)
        for (uint32_t i = 0; i < CONFIG_BYTES / 8; i++) {
            uint64_t changed = before->of[block][i] ^ after.of[block][i];

            CHECK((changed & ~machine->writable[block][i]) == 0);
            CHECK((changed & machine->watched[block][i]) == 0);
        }
}

static void check_exit(const struct av_exit *exit, uint32_t size)
{
    CHECK(exit->kind <= AV_EXIT_UART_FULL);
    CHECK(exit->kind == AV_EXIT_UART_FULL || exit->size == size);
    CHECK(exit->kind == AV_EXIT_UART_FULL || size == 8 || exit->value >> 8 * size == 0);
}

static void take_of_uart(struct machine *machine, uint32_t room)
{
    uint8_t *to = malloc(room);

    CHECK(to != NULL);
    machine->to_host += av_uart_take(machine->uart, to, room);
    free(to);
}

/* A port access of one element or, as by a string instruction, of several. */
static void pio(struct machine *machine, struct fuzz_input *in)
{
    static const uint16_t ports[] = { 0x3f8, 0x3f8, 0x70, 0xcf8, 0xcfc, 0x600, 0 };
    uint8_t how = fuzz_u8(in);
    uint32_t kind = how >> 5, size = 1u << (how & 3) % 3, count = how & 4 ? fuzz_u8(in) : 1;
    uint32_t port = kind < 6 ? ports[kind] + fuzz_below(in, 8) : fuzz_u16(in);
    uint32_t bytes = size * (count % ELEMENTS_MAX);
    struct kvm_run *run = calloc(1, sizeof(*run) + bytes);
    struct av_exit exit = { 0 };

    CHECK(run != NULL);
    run->io.direction = how & 8 ? KVM_EXIT_IO_OUT : KVM_EXIT_IO_IN;
    run->io.size = (uint8_t)size;
    run->io.port = (uint16_t)port;
    run->io.count = count % ELEMENTS_MAX;
    run->io.data_offset = sizeof(*run);
    fuzz_bytes(in, (uint8_t *)run + sizeof(*run), bytes);
    machine->vcpu.run = run;
    machine->vcpu.pio_done = 0;
    while (av_vcpu_pio_go_on(&machine->vcpu, &exit)) {
        check_exit(&exit, size);
        CHECK(machine->vcpu.pio_done < run->io.count);
        if (exit.kind == AV_EXIT_UART_FULL)
            take_of_uart(machine, 100);
        else
            machine->vcpu.pio_done++;
    }
    free(run);
}

static void mmio(struct machine *machine, struct fuzz_input *in)
{
    static const uint64_t places[] = { ECAM_GPA, ECAM_GPA + (1u << 15), MSIX_GPA, MMIO_GPA };
    uint8_t how = fuzz_u8(in);
    uint32_t kind = how >> 5;
    struct kvm_run *run = calloc(1, sizeof(*run));
    struct av_exit exit = { 0 };

    CHECK(run != NULL);
    run->mmio.phys_addr = kind < 4 ? places[kind] + fuzz_u8(in) : fuzz_number(in);
    run->mmio.len = 1 + (how & 7);
    run->mmio.is_write = how >> 3 & 1;
    fuzz_bytes(in, run->mmio.data, run->mmio.is_write ? run->mmio.len : 0);
    machine->vcpu.run = run;
    if (av_vcpu_mmio_exit(&machine->vcpu, &exit))
        check_exit(&exit, run->mmio.len);
    free(run);
}

static void put_to_uart(struct machine *machine, struct fuzz_input *in)
{
    uint32_t count = fuzz_u8(in) * 16u;
    uint8_t *from = calloc(1, count);
    size_t taken;

    CHECK(from != NULL);
    taken = av_uart_put(machine->uart, from, count);
    CHECK(taken <= count);
    machine->from_host += taken;
    free(from);
}

static void check_uart(const struct machine *machine)
{
    struct av_uart_stats stats;

    av_uart_statistics(machine->uart, &stats);
    CHECK(stats.tx_bytes - machine->to_host <= 65536);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input in = { data, size };
    struct machine machine = { 0 };

    fuzz_now_ns = (uint64_t)fuzz_u32(&in) * 1000000000u;
    create(&machine, &in);
    while (fuzz_more(&in)) {
        struct values before = values_of(&machine);
        uint32_t op = fuzz_below(&in, 8);

        if (op < 4)
            pio(&machine, &in);
        else if (op < 6)
            mmio(&machine, &in);
        else if (op == 6)
            put_to_uart(&machine, &in);
        else
            take_of_uart(&machine, fuzz_u8(&in));
        check(&machine, &before);
        check_uart(&machine);
    }
    destroy(&machine);
    return 0;
}
