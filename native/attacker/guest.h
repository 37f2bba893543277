/* A guest without an operating system that attacks its virtual machine monitor.
 *
 * What it is to do stands on its command line, as words like `attack=rings`; what came of it is
 * printed on the serial port, one line an attack. It uses general-purpose instructions only, so a
 * software KVM runs it too. */
#ifndef GUEST_H
#define GUEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define CPUS_MAX 4u
#define COM1 0x3f8
#define ACPI_SLEEP 0x600
#define ACPI_SLEEP_STATUS 0x601
#define VIRTIO_MMIO 0xd0000000ull
#define PCI_MEMORY 0xc0000000ull
#define PCI_ECAM 0xe0000000ull

#define ALIGNED(bytes) __attribute__((aligned(bytes)))
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

#define DEFINE_ACCESS(bits)                                                     \
    static inline uint##bits##_t read##bits(uint64_t gpa)                       \
    {                                                                           \
        return *(volatile uint##bits##_t *)gpa;                                 \
    }                                                                           \
    static inline void write##bits(uint64_t gpa, uint64_t value)                \
    {                                                                           \
        *(volatile uint##bits##_t *)gpa = (uint##bits##_t)value;                \
    }
DEFINE_ACCESS(8)
DEFINE_ACCESS(16)
DEFINE_ACCESS(32)
DEFINE_ACCESS(64)

static inline void out8(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline void out32(uint16_t port, uint32_t value)
{
    __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port));
}

static inline uint8_t in8(uint16_t port)
{
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline uint32_t in32(uint16_t port)
{
    uint32_t value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline uint64_t gpa_of(const volatile void *object)
{
    return (uint64_t)object; /* memory is mapped one to one */
}

void fill(volatile void *at, uint8_t value, size_t bytes);
bool is_filled(const volatile void *at, uint8_t value, size_t bytes);
void copy(volatile void *to, const volatile void *from, size_t bytes);
bool same(const volatile void *a, const volatile void *b, size_t bytes);
uint32_t next_random(uint32_t *state);

void print(const char *text);
void print_number(uint64_t value);
/* One line of the result. */
void say(const char *name, const char *outcome);
void power_off(void) __attribute__((noreturn));

/* Of the command line: the word after `name=`, "" without one. */
const char *option(const char *name);
bool option_is(const char *name, const char *value);
uint64_t option_number(const char *name);

/* Start the other vCPUs, once; each calls `work` with its number, 1 to cpus-1. */
void start_others(unsigned cpus, void (*work)(unsigned cpu));

#endif
