/* Registers, queues' places and interrupts as no driver would set them up. */
#include "attacks.h"

#define NOWHERE (1ull << 40)
#define ALL_ONES 0xffffffffffffffffull
#define FUNCTIONS 256u
#define FUNCTION_BYTES 0x1000u
#define CONFIG_BYTES 0x100u
#define BAR_BYTES 0x10000u
#define MMIO_BYTES 0x200u
#define NO_VECTOR 0xffffu

static void works(struct target *target, const char *name)
{
    say(name, target_works(target) ? "works" : "BROKEN");
}

static void works_after_reset(struct target *target, const char *name)
{
    target_open(target);
    works(target, name);
}

/* --- features -------------------------------------------------------------------------- */

static void features(struct target *target, const char *name, uint64_t wanted)
{
    bool taken = device_begin(&target->device, wanted);

    device_set_status(&target->device, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    device_kick(&target->device, 0);
    say(name, taken || device_status(&target->device) & DRIVER_OK ? "TAKEN" : "refused");
}

static void features_late(struct target *target)
{
    target_open(target);
    device_set_features(&target->device, 0);
    works(target, "features-late");
}

/* --- places of queues ------------------------------------------------------------------ */

static void place_at(struct target *target, const char *name, const struct place *place)
{
    bool broken;

    device_begin(&target->device, target->features);
    device_set_place(&target->device, target->attacked, place);
    device_enable(&target->device, target->attacked);
    device_set_status(&target->device, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    device_kick(&target->device, target->attacked);
    broken = (device_status(&target->device) & NEEDS_RESET) != 0;
    say(name, broken ? "needs-reset" : "taken");
}

static void places(struct target *target)
{
    struct ring *ring = attacked_ring(target);
    struct place place, sound;

    device_reset(&target->device); /* or the ring that is cleared would be one in use */
    ring_clear(ring, &target->device, target->attacked, target->packed,
               &memory.ring[target->attacked]);
    sound = ring_place(ring);
    place = sound;
    place.size = 0;
    place_at(target, "queue-of-none", &place);
    place.size = 3;
    place_at(target, "queue-of-three", &place);
    place.size = 0xffff;
    place_at(target, "queue-too-large", &place);
    place = sound;
    place.desc += 8;
    place_at(target, "queue-unaligned", &place);
    place.desc = NOWHERE;
    place_at(target, "queue-nowhere", &place);
    place.desc = ALL_ONES - 15;
    place_at(target, "queue-wrapping", &place);
    place.desc = option_number("ram") - 16;
    place_at(target, "queue-past-the-end", &place);
    place = sound;
    place.driver = PCI_MEMORY;
    place_at(target, "driver-area-in-pci-hole", &place);
    place = sound;
    place.device = ALL_ONES - 3;
    place_at(target, "device-area-wrapping", &place);
}

static void moved_live(struct target *target)
{
    struct place place = { 8, NOWHERE, NOWHERE, NOWHERE };

    target_open(target);
    device_set_place(&target->device, target->attacked, &place);
    device_enable(&target->device, target->attacked);
    works(target, "moved-live");
}

/* On virtio-mmio a queue may be taken away (4.2.2, QueueReady); on virtio-pci it may not. */
static void taken_away_live(struct target *target)
{
    struct ring *ring;

    target_open(target);
    ring = attacked_ring(target);
    if (target->device.pci) {
        write16(target->device.common + PCI_QUEUE_SELECT, target->attacked);
        write16(target->device.common + PCI_QUEUE_ENABLE, 0);
    } else {
        write32(target->device.common + MMIO_QUEUE_SEL, target->attacked);
        write32(target->device.common + MMIO_QUEUE_READY, 0);
        ring_clear(ring, &target->device, target->attacked, target->packed, ring->memory);
        ring_open(ring);
    }
    works(target, "taken-away-live");
}

/* --- registers ------------------------------------------------------------------------- */

static void touch(uint64_t gpa, uint64_t value)
{
    (void)read8(gpa);
    (void)read16(gpa);
    (void)read32(gpa);
    (void)read64(gpa);
    write8(gpa, value);
    write16(gpa, value);
    write32(gpa, value);
    write64(gpa, value);
}

static void registers(struct target *target)
{
    struct device *device = &target->device;

    if (device->pci) {
        for (uint64_t at = 0; at < PCI_COMMON_BYTES + 8; at++)
            touch(device->common + at, ALL_ONES);
        for (uint64_t at = 0; at < BAR_BYTES; at += 0x7fc)
            touch(device->bar + at, ALL_ONES);
        touch(device->bar + BAR_BYTES - 4, 0); /* half of it in the next one */
        write32(device->notify + device->notify_step * 200, 200);
        write32(device->notify + 2, 0);
    } else {
        for (uint64_t at = 0; at < MMIO_BYTES + 8; at += 3)
            touch(device->common + at, ALL_ONES);
        for (uint64_t at = 0; at < MMIO_BYTES; at += 4)
            write32(device->common + at, ALL_ONES);
    }
    works_after_reset(target, "registers");
}

static void configuration_space(struct target *target)
{
    const uint64_t space = target->device.space;
    uint32_t bar = read32(space + PCI_BAR0), there = 0;

    for (uint64_t function = 0; function < FUNCTIONS; function += 5)
        there += read32(PCI_ECAM + function * FUNCTION_BYTES + CONFIG_BYTES) != UINT32_MAX;
    for (uint64_t at = CONFIG_BYTES - 1; at < FUNCTION_BYTES; at += 0x101)
        touch(space + at, ALL_ONES);
    for (uint32_t address = 0; address != 0xe0000000; address += 0x20000000) {
        out32(0xcf8, address | 0x00ffffff);
        there += in32(0xcfc) != UINT32_MAX;
        out32(0xcfc, UINT32_MAX);
    }
    say("functions-that-are-not-there", there == 0 ? "ones" : "SOMETHING");
    for (uint64_t at = 0; at < CONFIG_BYTES; at++)
        touch(space + at, ALL_ONES);
    for (uint64_t at = 0; at < CONFIG_BYTES; at++)
        touch(space + at, 0);
    write32(space + PCI_BAR0, bar);
    write32(space + PCI_BAR0 + 4, 0);
    write16(space + PCI_COMMAND, PCI_COMMAND_MEMORY_MASTER);
    works_after_reset(target, "configuration-space");
}

static void moved_bar(struct target *target)
{
    static const uint64_t to[] = { 0,          0x100000,   0xfee00000,         PCI_ECAM,
                                   0xfffb0000, 0xcfff8000, 0xffffffffffff0000, 1ull << 40 };
    const uint64_t at = target->device.space + PCI_BAR0;
    uint32_t bar = read32(at);

    for (unsigned i = 0; i < COUNT(to); i++) {
        write32(at, to[i]);
        write32(at + 4, to[i] >> 32);
        device_kick(&target->device, 0);
    }
    write32(at, bar);
    write32(at + 4, 0);
    works_after_reset(target, "moved-bar");
}

/* --- MSI-X ----------------------------------------------------------------------------- */

static void message(const struct device *device, uint64_t address, uint32_t data, uint32_t masked)
{
    write32(device->table, address);
    write32(device->table + 4, address >> 32);
    write32(device->table + 8, data);
    write32(device->table + 12, masked);
}

static void give_vector(const struct target *target, uint16_t vector)
{
    write16(target->device.common + PCI_QUEUE_SELECT, target->attacked);
    write16(target->device.common + PCI_QUEUE_MSIX_VECTOR, vector);
    write16(target->device.common + PCI_CONFIG_MSIX_VECTOR, vector);
}

static void masked_for_ever(struct target *target)
{
    const struct device *device = &target->device;
    bool sound = true, pending;

    message(device, 0xfee00000, 0x41, 1);
    write16(device->msix + MSIX_CONTROL, MSIX_ENABLE);
    target_open(target);
    give_vector(target, 0);
    for (unsigned i = 0; i < 20; i++)
        sound &= target_works(target);
    pending = (read64(device->pending) & 1) != 0;
    say("masked-for-ever", sound && pending ? "works, pending" : "BROKEN");
    write16(device->msix + MSIX_CONTROL, MSIX_ENABLE | MSIX_MASK_ALL);
    works(target, "all-masked");
}

static void messages_that_are_none(struct target *target)
{
    const struct device *device = &target->device;
    static const uint64_t to[] = { 0, 0x100000, 0xfec00000, 0xffffffffffffffff, 0xfee00000 };
    bool sound = true;

    write16(device->msix + MSIX_CONTROL, MSIX_ENABLE);
    target_open(target);
    give_vector(target, 0);
    for (unsigned i = 0; i < COUNT(to); i++) {
        message(device, to[i], UINT32_MAX, 0);
        sound &= target_works(target);
    }
    say("messages-that-are-none", sound ? "works" : "BROKEN");
    give_vector(target, 0xfffe);
    say("vector-that-is-none",
        read16(device->common + PCI_QUEUE_MSIX_VECTOR) == NO_VECTOR ? "refused" : "TAKEN");
    message(device, 0, 0, 1);
    write16(device->msix + MSIX_CONTROL, 0);
}

void attack_setup(struct target *target)
{
    features(target, "features-never-offered", ALL_ONES);
    features(target, "features-of-old", 0);
    features_late(target);
    places(target);
    moved_live(target);
    taken_away_live(target);
    registers(target);
    if (target->device.pci) {
        configuration_space(target);
        moved_bar(target);
        masked_for_ever(target);
        messages_that_are_none(target);
    }
    target_check(target);
}
