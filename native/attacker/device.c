#include "device.h"

#define CAPABILITY_VENDOR 0x09
#define CAPABILITY_MSIX 0x11
#define COMMON_CFG 1
#define NOTIFY_CFG 2
#define DEVICE_CFG 4

static void take_capability(struct device *device, uint64_t at)
{
    uint64_t place = device->bar + read32(at + 8);

    if (read8(at) == CAPABILITY_MSIX) {
        device->msix = at;
        device->table = device->bar + (read32(at + 4) & ~7u);
        device->pending = device->bar + (read32(at + 8) & ~7u);
    } else if (read8(at) == CAPABILITY_VENDOR && read8(at + 3) == COMMON_CFG) {
        device->common = place;
    } else if (read8(at) == CAPABILITY_VENDOR && read8(at + 3) == NOTIFY_CFG) {
        device->notify = place;
        device->notify_step = read32(at + 16);
    } else if (read8(at) == CAPABILITY_VENDOR && read8(at + 3) == DEVICE_CFG) {
        device->config = place;
    }
}

void device_find(struct device *device, bool pci, unsigned slot)
{
    *device = (struct device){ .pci = pci };
    if (!pci) {
        device->common = VIRTIO_MMIO + 0x1000ull * slot;
        device->config = device->common + MMIO_CONFIG;
        device->notify = device->common + MMIO_QUEUE_NOTIFY;
        return;
    }
    device->space = PCI_ECAM + 0x8000ull * (slot + 1);
    device->bar = read32(device->space + PCI_BAR0) & ~0xfu;
    for (uint8_t at = read8(device->space + PCI_CAPABILITIES); at != 0;
         at = read8(device->space + at + 1))
        take_capability(device, device->space + at);
    write16(device->space + PCI_COMMAND, PCI_COMMAND_MEMORY_MASTER);
}

uint8_t device_status(const struct device *device)
{
    return device->pci ? read8(device->common + PCI_DEVICE_STATUS)
                       : (uint8_t)read32(device->common + MMIO_STATUS);
}

void device_set_status(const struct device *device, uint8_t status)
{
    if (device->pci)
        write8(device->common + PCI_DEVICE_STATUS, status);
    else
        write32(device->common + MMIO_STATUS, status);
}

void device_reset(const struct device *device)
{
    device_set_status(device, 0);
    while (device_status(device) != 0)
        continue;
}

void device_set_features(const struct device *device, uint64_t features)
{
    uint64_t select = device->pci ? PCI_DRIVER_FEATURE_SELECT : MMIO_DRIVER_FEATURES_SEL;
    uint64_t word = device->pci ? PCI_DRIVER_FEATURE : MMIO_DRIVER_FEATURES;

    for (unsigned i = 0; i < 2; i++) {
        write32(device->common + select, i);
        write32(device->common + word, features >> 32 * i);
    }
}

bool device_begin(const struct device *device, uint64_t features)
{
    device_reset(device);
    device_set_status(device, ACKNOWLEDGE | DRIVER);
    device_set_features(device, features);
    device_set_status(device, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    return (device_status(device) & FEATURES_OK) != 0;
}

static void write_halves(uint64_t at, uint64_t value)
{
    write32(at, value);
    write32(at + 4, value >> 32);
}

void device_set_place(const struct device *device, unsigned queue, const struct place *place)
{
    uint64_t common = device->common;

    if (device->pci) {
        write16(common + PCI_QUEUE_SELECT, queue);
        write16(common + PCI_QUEUE_SIZE, place->size);
        write_halves(common + PCI_QUEUE_DESC, place->desc);
        write_halves(common + PCI_QUEUE_DRIVER, place->driver);
        write_halves(common + PCI_QUEUE_DEVICE, place->device);
    } else {
        write32(common + MMIO_QUEUE_SEL, queue);
        write32(common + MMIO_QUEUE_SIZE, place->size);
        write_halves(common + MMIO_QUEUE_DESC, place->desc);
        write_halves(common + MMIO_QUEUE_DRIVER, place->driver);
        write_halves(common + MMIO_QUEUE_DEVICE, place->device);
    }
}

void device_enable(const struct device *device, unsigned queue)
{
    if (device->pci) {
        write16(device->common + PCI_QUEUE_SELECT, queue);
        write16(device->common + PCI_QUEUE_ENABLE, 1);
    } else {
        write32(device->common + MMIO_QUEUE_SEL, queue);
        write32(device->common + MMIO_QUEUE_READY, 1);
    }
}

void device_kick(const struct device *device, unsigned queue)
{
    if (device->pci)
        write16(device->notify + device->notify_step * queue, queue);
    else
        write32(device->notify, queue);
}
