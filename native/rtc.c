#include "rtc.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

#define INDEX 0
#define CELLS 128

enum {
    SECONDS = 0x00,
    MINUTES = 0x02,
    HOURS = 0x04,
    DAY_OF_WEEK = 0x06,
    DAY = 0x07,
    MONTH = 0x08,
    YEAR = 0x09,
    REGISTER_A = 0x0A,
    REGISTER_B = 0x0B,
    REGISTER_C = 0x0C,
    REGISTER_D = 0x0D,
    CENTURY = 0x32
};

#define A_32768_HZ 0x26
#define B_24_HOURS (1u << 1)
#define B_BINARY (1u << 2)
#define D_VALID (1u << 7)
#define PM (1u << 7)

struct av_rtc {
    _Atomic uint8_t index;
    _Atomic uint8_t cell[CELLS];
};

struct av_rtc *av_rtc_create(void)
{
    struct av_rtc *rtc = calloc(1, sizeof(*rtc));
    if (rtc == NULL)
        return NULL;
    atomic_init(&rtc->cell[REGISTER_A], A_32768_HZ);
    atomic_init(&rtc->cell[REGISTER_B], B_24_HOURS);
    atomic_init(&rtc->cell[REGISTER_D], D_VALID);
    return rtc;
}

void av_rtc_destroy(struct av_rtc *rtc)
{
    free(rtc);
}

static uint8_t number(uint8_t mode, int value)
{
    return (uint8_t)((mode & B_BINARY) != 0 ? value : value / 10 << 4 | value % 10);
}

static uint8_t hours(uint8_t mode, int hour)
{
    if ((mode & B_24_HOURS) != 0)
        return number(mode, hour);
    return (uint8_t)(number(mode, (hour + 11) % 12 + 1) | (hour >= 12 ? PM : 0));
}

uint8_t av_rtc_read(const struct av_rtc *rtc, uint32_t port, int64_t now)
{
    uint8_t cell = atomic_load(&rtc->index), mode = atomic_load(&rtc->cell[REGISTER_B]);
    time_t seconds = (time_t)now;
    struct tm utc;

    if (port == INDEX || gmtime_r(&seconds, &utc) == NULL)
        return 0xff;
    switch (cell) {
    case SECONDS:
        return number(mode, utc.tm_sec);
    case MINUTES:
        return number(mode, utc.tm_min);
    case HOURS:
        return hours(mode, utc.tm_hour);
    case DAY_OF_WEEK:
        return number(mode, utc.tm_wday + 1);
    case DAY:
        return number(mode, utc.tm_mday);
    case MONTH:
        return number(mode, utc.tm_mon + 1);
    case YEAR:
        return number(mode, utc.tm_year % 100);
    case CENTURY:
        return number(mode, (utc.tm_year + 1900) / 100);
    default:
        return atomic_load(&rtc->cell[cell]);
    }
}

void av_rtc_write(struct av_rtc *rtc, uint32_t port, uint8_t value)
{
    uint8_t cell = atomic_load(&rtc->index);

    if (port == INDEX)
        atomic_store(&rtc->index, value & (CELLS - 1)); /* bit 7 masks the NMI */
    else if (cell != REGISTER_C && cell != REGISTER_D)
        atomic_store(&rtc->cell[cell], value);
}
