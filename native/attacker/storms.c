/* What does not end by itself. */
#include "attacks.h"

#define LOAD_CHAINS 4u
#define NO_QUEUE 0xffffu
#define DOT_EVERY 2u

static struct target *shared;
static void (*storm)(unsigned turn);

static void port(unsigned turn)
{
    (void)turn;
    (void)in8(ACPI_SLEEP_STATUS);
}

static void unassigned(unsigned turn)
{
    (void)turn;
    out8(0x80, 0);
}

/* Read by Python, on either transport. */
static void mmio(unsigned turn)
{
    (void)turn;
    if (shared->device.pci)
        (void)read8(shared->device.common + PCI_CONFIG_GENERATION);
    else
        (void)read32(shared->device.common + MMIO_STATUS);
}

static void reset(unsigned turn)
{
    (void)turn;
    device_set_status(&shared->device, 0);
}

/* Notifications of a queue that does not exist, or is not ready, which KVM does not take. */
static void stray_kick(unsigned turn)
{
    (void)turn;
    if (shared->device.pci)
        write8(shared->device.notify + 2, 0);
    else
        write32(shared->device.notify, NO_QUEUE);
}

static void kick(unsigned turn)
{
    device_kick(&shared->device, turn % shared->queues);
}

/* Set up, break, reset. */
static void fault(unsigned turn)
{
    struct piece piece = { 1ull << 40, 512, 0 };
    uint32_t len;

    (void)turn;
    target_open(shared);
    ring_offer(attacked_ring(shared), &piece, 1);
    target_provoke(shared);
    target_await(shared, &len);
}

static void bar(unsigned turn)
{
    write16(shared->device.space + PCI_COMMAND, turn % 2 ? 0 : PCI_COMMAND_MEMORY_MASTER);
}

static void mask(unsigned turn)
{
    write32(shared->device.table + 12, turn & 1);
}

static void serial(unsigned turn)
{
    (void)turn;
    out8(COM1, '#');
}

/* Requests of the guest's as fast as it can make them. */
static void requests(unsigned turn)
{
    struct piece piece[PIECES_MAX];
    unsigned data, count = target_chain(shared, piece, &data);
    uint32_t len;

    (void)turn;
    ring_offer(attacked_ring(shared), piece, count);
    device_kick(&shared->device, shared->attacked);
    target_await(shared, &len);
}

/* The work of a guest that harms nobody, to compare with. */
static void spin(unsigned turn)
{
    (void)turn;
}

static const struct {
    const char *name;
    void (*turn)(unsigned turn);
    bool alone; /* by the first vCPU only */
} storms[] = {
    { "port", port, false },       { "unassigned", unassigned, false },
    { "mmio", mmio, false },       { "reset", reset, false },
    { "stray-kick", stray_kick, false }, { "kick", kick, false },
    { "fault", fault, true },      { "bar", bar, false },
    { "mask", mask, false },       { "serial", serial, false },
    { "requests", requests, true }, { "spin", spin, false },
};

static void for_ever(unsigned cpu)
{
    (void)cpu;
    for (unsigned turn = 0;; turn++)
        storm(turn);
}

void attack_storm(struct target *target)
{
    bool alone = true;

    shared = target;
    for (unsigned i = 0; i < COUNT(storms); i++) {
        if (!option_is("storm", storms[i].name))
            continue;
        storm = storms[i].turn;
        alone = storms[i].alone;
    }
    if (storm == NULL) {
        say("storm", "UNKNOWN");
        return;
    }
    target_open(target);
    if (target->device.pci) {
        write32(target->device.table, 0xfee00000);
        write32(target->device.table + 8, 0x41);
        write16(target->device.msix + MSIX_CONTROL, MSIX_ENABLE);
    }
    say("storm", "begins");
    if (!alone)
        start_others((unsigned)option_number("cpus"), for_ever);
    for_ever(0);
}

/* Without a table of interrupts, while the disk writes to memory. */
void attack_triple_fault(struct target *target)
{
    static const struct {
        uint16_t limit;
        uint64_t base;
    } __attribute__((packed)) nothing = { 0, 0 };
    struct piece piece[PIECES_MAX];
    unsigned data;

    target_open(target);
    for (unsigned i = 0; i < 4; i++)
        ring_offer(attacked_ring(target), piece, target_chain(target, piece, &data));
    target_provoke(target);
    __asm__ volatile("lidt %0\n\tint $0x20" : : "m"(nothing));
}

/* Jumps to where no memory is. */
void attack_nowhere(struct target *target)
{
    void (*at)(void) = (void (*)(void))PCI_MEMORY;

    target_open(target);
    at();
}

void load(struct target *target)
{
    struct piece piece[PIECES_MAX];
    uint32_t len;

    target_open(target);
    for (;;) {
        for (unsigned slot = 0; slot < LOAD_CHAINS; slot++) {
            blk_chain(piece, BLK_T_IN, slot, slot);
            ring_offer(&target->ring[0], piece, 3);
        }
        device_kick(&target->device, 0);
        for (unsigned taken = 0; taken < LOAD_CHAINS;)
            taken += ring_take(&target->ring[0], &len);
    }
}

void behave(struct target *target)
{
    target_open(target);
    for (unsigned round = 1;; round++) {
        if (!target_works(target)) {
            say("behave", "BROKEN");
            return;
        }
        if (round % DOT_EVERY == 0)
            print(".");
    }
}
