/* The registers of a virtio device, on either transport (virtio 1.3 sections 4.1 and 4.2). */
#ifndef DEVICE_H
#define DEVICE_H

#include "guest.h"

#define ACKNOWLEDGE 1u
#define DRIVER 2u
#define DRIVER_OK 4u
#define FEATURES_OK 8u
#define NEEDS_RESET 64u

#define F_INDIRECT_DESC (1ull << 28)
#define F_VERSION_1 (1ull << 32)
#define F_RING_PACKED (1ull << 34)

/* virtio-mmio registers. */
#define MMIO_DRIVER_FEATURES 0x20
#define MMIO_DRIVER_FEATURES_SEL 0x24
#define MMIO_QUEUE_SEL 0x30
#define MMIO_QUEUE_SIZE 0x38
#define MMIO_QUEUE_READY 0x44
#define MMIO_QUEUE_NOTIFY 0x50
#define MMIO_STATUS 0x70
#define MMIO_QUEUE_DESC 0x80
#define MMIO_QUEUE_DRIVER 0x90
#define MMIO_QUEUE_DEVICE 0xa0
#define MMIO_CONFIG 0x100

/* struct virtio_pci_common_cfg. */
#define PCI_DRIVER_FEATURE_SELECT 0x08
#define PCI_DRIVER_FEATURE 0x0c
#define PCI_CONFIG_MSIX_VECTOR 0x10
#define PCI_DEVICE_STATUS 0x14
#define PCI_CONFIG_GENERATION 0x15
#define PCI_QUEUE_SELECT 0x16
#define PCI_QUEUE_SIZE 0x18
#define PCI_QUEUE_MSIX_VECTOR 0x1a
#define PCI_QUEUE_ENABLE 0x1c
#define PCI_QUEUE_DESC 0x20
#define PCI_QUEUE_DRIVER 0x28
#define PCI_QUEUE_DEVICE 0x30
#define PCI_COMMON_BYTES 0x38

/* Configuration space. */
#define PCI_COMMAND 0x04
#define PCI_BAR0 0x10
#define PCI_CAPABILITIES 0x34
#define PCI_COMMAND_MEMORY_MASTER 6u
#define MSIX_CONTROL 2u /* of the capability */
#define MSIX_ENABLE 0x8000u
#define MSIX_MASK_ALL 0x4000u

/* common: of virtio-mmio, all registers. space, bar, msix, table, pending: virtio-pci only. */
struct device {
    bool pci;
    uint64_t common;
    uint64_t config;
    uint64_t notify;
    uint32_t notify_step;
    uint64_t space;
    uint64_t bar;
    uint64_t msix;
    uint64_t table;
    uint64_t pending;
};

/* Where a ring is. */
struct place {
    uint32_t size;
    uint64_t desc, driver, device;
};

void device_find(struct device *device, bool pci, unsigned slot);
uint8_t device_status(const struct device *device);
void device_set_status(const struct device *device, uint8_t status);
/* Returns when it is over. */
void device_reset(const struct device *device);
void device_set_features(const struct device *device, uint64_t features);
/* Reset and negotiate; whether the device takes these features. */
bool device_begin(const struct device *device, uint64_t features);
void device_set_place(const struct device *device, unsigned queue, const struct place *place);
void device_enable(const struct device *device, unsigned queue);
void device_kick(const struct device *device, unsigned queue);

#endif
