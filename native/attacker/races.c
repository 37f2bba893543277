/* vCPUs that get in each other's way. The first runs one race after the other, and between them
 * the others wait. */
#include "attacks.h"

#define TRASH 0x77
#define ROUNDS 8u
#define POLLS 12u

/* What the chains of any device have it write to: statuses, and data. */
#define WRITTEN_1 (memory.arena + 0x800)
#define WRITTEN_1_BYTES 0x40u
#define WRITTEN_2 (memory.arena + 0x2000)
#define WRITTEN_2_BYTES 0x400u

static struct target *shared;
static void (*volatile disturb)(unsigned cpu, uint32_t *random); /* NULL: wait */
static volatile uint32_t disturbing[CPUS_MAX];
static unsigned cpus;

static void other(unsigned cpu)
{
    uint32_t random = cpu;

    for (;;) {
        void (*work)(unsigned cpu, uint32_t *random) = disturb;

        disturbing[cpu] = work != NULL;
        if (work != NULL && disturb == work)
            work(cpu, &random);
    }
}

static void begin(void (*work)(unsigned cpu, uint32_t *random))
{
    disturb = work;
    for (unsigned cpu = 1; cpu < cpus; cpu++)
        while (!disturbing[cpu])
            continue;
}

static void end(void)
{
    disturb = NULL;
    for (unsigned cpu = 1; cpu < cpus; cpu++)
        while (disturbing[cpu])
            continue;
}

static void works_after(const char *name)
{
    end();
    target_open(shared);
    say(name, target_works(shared) ? "works" : "BROKEN");
}

/* --- the ring is written while it is read ------------------------------------------------ */

/* Whatever a mixture of these names is in the arena, or nowhere: guards have to stay whole. */
static void scribble(unsigned cpu, uint32_t *random)
{
    static const uint32_t lens[] = { 0, 1, 16, 512, 1500, UINT32_MAX };
    volatile struct ring_memory *ring = &memory.ring[shared->attacked];
    volatile struct desc *desc = &ring->desc[next_random(random) % RING_SIZE];

    (void)cpu;
    desc->len = lens[next_random(random) % COUNT(lens)];
    desc->third = (uint16_t)next_random(random) & 0x1f;
    desc->fourth = (uint16_t)(next_random(random) & 0x809f);
    desc->gpa = next_random(random) % 4 == 0 ? 1ull << 40 : gpa_of(&memory.arena[0x2000]);
    if (!shared->packed)
        ring->driver[2 + next_random(random) % RING_SIZE] = (uint16_t)next_random(random) & 0x1f;
    if (next_random(random) % 64 == 0)
        ring->driver[next_random(random) % 2] = (uint16_t)next_random(random) & 0x1f;
}

static void scribbled_rings(void)
{
    struct piece piece[PIECES_MAX];
    unsigned data;

    begin(scribble);
    for (unsigned round = 0; round < ROUNDS; round++) {
        target_open(shared);
        for (unsigned i = 0; i < 4; i++) {
            unsigned count = target_chain(shared, piece, &data);

            ring_offer(attacked_ring(shared), piece, count);
            target_provoke(shared);
            for (unsigned poll = 0; poll < POLLS; poll++)
                if (device_status(&shared->device) & NEEDS_RESET)
                    break;
        }
    }
    works_after("scribbled-rings");
}

/* --- a reset while requests are in flight ------------------------------------------------ */

static volatile uint32_t step;
static volatile uint32_t late;

static void reset_when_told(unsigned cpu, uint32_t *random)
{
    (void)random;
    if (cpu != 1 || step != 1)
        return;
    device_reset(&shared->device);
    /* From here on all memory is the driver's (2.4.1). */
    fill(WRITTEN_1, TRASH, WRITTEN_1_BYTES);
    fill(WRITTEN_2, TRASH, WRITTEN_2_BYTES);
    for (unsigned poll = 0; poll < POLLS; poll++)
        (void)device_status(&shared->device);
    if (!is_filled(WRITTEN_1, TRASH, WRITTEN_1_BYTES) ||
        !is_filled(WRITTEN_2, TRASH, WRITTEN_2_BYTES))
        late++;
    step = 0;
}

static void reset_in_flight(void)
{
    struct piece piece[PIECES_MAX];
    unsigned data;

    late = 0;
    begin(reset_when_told);
    for (unsigned round = 0; round < ROUNDS; round++) {
        target_open(shared);
        for (unsigned i = 0; i < 5; i++) {
            unsigned count = target_chain(shared, piece, &data);

            ring_offer(attacked_ring(shared), piece, count);
        }
        target_provoke(shared);
        step = 1;
        while (step != 0)
            continue;
    }
    say("reset-in-flight", late == 0 ? "quiet" : "WRITTEN AFTERWARDS");
    works_after("reset-in-flight, after");
}

/* --- registers that several write -------------------------------------------------------- */

static void random_status(unsigned cpu, uint32_t *random)
{
    static const uint8_t status[] = { 0, 1, 3, 11, 15, 128, 0xff };

    (void)cpu;
    device_set_status(&shared->device, status[next_random(random) % COUNT(status)]);
}

static void random_setup(unsigned cpu, uint32_t *random)
{
    struct place place = ring_place(&shared->ring[0]);

    switch (next_random(random) % 5) {
    case 0:
        device_set_features(&shared->device, next_random(random) % 2 ? shared->features : 0);
        break;
    case 1:
        place.size = next_random(random) % 64;
        place.desc += next_random(random) % 2 ? 0 : 1ull << 40;
        device_set_place(&shared->device, next_random(random) % 4, &place);
        break;
    case 2:
        device_enable(&shared->device, next_random(random) % 4);
        break;
    case 3:
        device_kick(&shared->device, next_random(random) % 4);
        break;
    default:
        random_status(cpu, random);
    }
}

static void all_do(const char *name, void (*work)(unsigned cpu, uint32_t *random), unsigned rounds)
{
    uint32_t random = 0;

    target_open(shared);
    begin(work);
    for (unsigned round = 0; round < rounds; round++)
        work(0, &random);
    works_after(name);
}

/* --- storms while the device works -------------------------------------------------------- */

static void kick(unsigned cpu, uint32_t *random)
{
    (void)cpu;
    (void)random;
    for (unsigned queue = 0; queue < shared->queues; queue++)
        device_kick(&shared->device, queue);
}

static void mask(unsigned cpu, uint32_t *random)
{
    static const uint16_t control[] = { 0, MSIX_ENABLE, MSIX_ENABLE | MSIX_MASK_ALL };

    (void)cpu;
    write16(shared->device.msix + MSIX_CONTROL, control[next_random(random) % COUNT(control)]);
    write32(shared->device.table + 12, next_random(random) & 1);
}

static void works_during(const char *name, void (*work)(unsigned cpu, uint32_t *random))
{
    bool sound = true;

    target_open(shared);
    begin(work);
    for (unsigned round = 0; round < ROUNDS; round++)
        sound &= target_works(shared);
    end();
    say(name, sound ? "works" : "BROKEN");
}

/* The BAR comes and goes while its registers are used: all that is read may be ones. */
static void hide(unsigned cpu, uint32_t *random)
{
    (void)cpu;
    write16(shared->device.space + PCI_COMMAND, next_random(random) & 2);
}

static void hidden_bar(void)
{
    struct piece piece[PIECES_MAX];
    unsigned data;

    target_open(shared);
    begin(hide);
    for (unsigned round = 0; round < ROUNDS; round++) {
        ring_offer(attacked_ring(shared), piece, target_chain(shared, piece, &data));
        target_provoke(shared);
    }
    end();
    write16(shared->device.space + PCI_COMMAND, PCI_COMMAND_MEMORY_MASTER);
    works_after("hidden-bar");
}

void attack_races(struct target *target)
{
    shared = target;
    cpus = (unsigned)option_number("cpus");
    start_others(cpus, other);
    scribbled_rings();
    reset_in_flight();
    all_do("status-of-many", random_status, 4 * ROUNDS);
    all_do("setup-of-many", random_setup, 4 * ROUNDS);
    works_during("kick-storm", kick);
    if (target->device.pci) {
        works_during("mask-storm", mask);
        write16(target->device.msix + MSIX_CONTROL, 0);
        hidden_bar();
    }
    target_check(target);
}
