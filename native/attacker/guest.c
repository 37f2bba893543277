#include "guest.h"

#define ZERO_PAGE_CMDLINE 0x228
#define TRAMPOLINE 0x10000ull /* free, and its page number is the start-up vector */
#define APIC_SPURIOUS 0xfee000f0ull
#define APIC_COMMAND 0xfee00300ull
#define APIC_ON 0x1ff
#define INIT_ALL_OTHERS 0xc4500
#define START_ALL_OTHERS 0xc4600

extern const char trampoline[], trampoline_end[];
void attacker_main(uint64_t zero_page);
void other_main(unsigned cpu);
void attack(void);

static const char *command_line = "";
static void (*others_work)(unsigned cpu);

void fill(volatile void *at, uint8_t value, size_t bytes)
{
    __asm__ volatile("rep stosb" : "+D"(at), "+c"(bytes) : "a"(value) : "memory");
}

bool is_filled(const volatile void *at, uint8_t value, size_t bytes)
{
    const uint64_t *word = (const uint64_t *)at, wanted = 0x0101010101010101ull * value;

    for (size_t i = 0; i < bytes / sizeof(*word); i++)
        if (read64(gpa_of(&word[i])) != wanted)
            return false;
    return true;
}

void copy(volatile void *to, const volatile void *from, size_t bytes)
{
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes) : : "memory");
}

bool same(const volatile void *a, const volatile void *b, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++)
        if (((const volatile uint8_t *)a)[i] != ((const volatile uint8_t *)b)[i])
            return false;
    return true;
}

uint32_t next_random(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

void print(const char *text)
{
    for (; *text != 0; text++)
        out8(COM1, (uint8_t)*text);
}

void print_number(uint64_t value)
{
    char digits[24], *at = &digits[sizeof(digits) - 1];

    *at = 0;
    do {
        *--at = (char)('0' + value % 10);
        value /= 10;
    } while (value != 0);
    print(at);
}

void say(const char *name, const char *outcome)
{
    print(name);
    print(": ");
    print(outcome);
    print("\n");
}

void power_off(void)
{
    out8(ACPI_SLEEP, 0x34); /* SLP_EN, SLP_TYP 5 */
    for (;;)
        continue;
}

const char *option(const char *name)
{
    for (const char *word = command_line; *word != 0;) {
        const char *left = name;

        while (*left != 0 && *word == *left) {
            word++;
            left++;
        }
        if (*left == 0 && *word == '=')
            return word + 1;
        while (*word != 0 && *word != ' ')
            word++;
        while (*word == ' ')
            word++;
    }
    return "";
}

bool option_is(const char *name, const char *value)
{
    const char *word = option(name);

    while (*value != 0 && *word == *value) {
        word++;
        value++;
    }
    return *value == 0 && (*word == 0 || *word == ' ');
}

uint64_t option_number(const char *name)
{
    uint64_t value = 0;

    for (const char *digit = option(name); *digit >= '0' && *digit <= '9'; digit++)
        value = 10 * value + (uint64_t)(*digit - '0');
    return value;
}

void other_main(unsigned cpu)
{
    others_work(cpu);
}

void start_others(unsigned cpus, void (*work)(unsigned cpu))
{
    others_work = work;
    if (cpus < 2)
        return;
    copy((void *)TRAMPOLINE, trampoline, (size_t)(trampoline_end - trampoline));
    write32(APIC_SPURIOUS, APIC_ON);
    write32(APIC_COMMAND, INIT_ALL_OTHERS);
    write32(APIC_COMMAND, START_ALL_OTHERS | TRAMPOLINE >> 12);
}

void attacker_main(uint64_t zero_page)
{
    command_line = (const char *)(uint64_t)read32(zero_page + ZERO_PAGE_CMDLINE);
    attack();
    print("end\n");
    power_off();
}
