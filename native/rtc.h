/* The CMOS clock. */
#ifndef AV_RTC_H
#define AV_RTC_H

#include <stdint.h>

/* cdef begin */
/* A MC146818 with the PC's century register, always right and in UTC: the time registers follow
 * the host's clock, and writes to them are ignored. The update-in-progress bit never shows, since
 * a read takes one moment's time for the whole of it. Any thread; port by port as on a PC, so
 * vCPUs that use it at once disturb each other. Linux reads some 75 registers in a boot. */
struct av_rtc;
struct av_rtc *av_rtc_create(void); /* NULL: errno */
void av_rtc_destroy(struct av_rtc *rtc);
/* port: 0 the index, 1 the data. now: seconds since the epoch. */
uint8_t av_rtc_read(const struct av_rtc *rtc, uint32_t port, int64_t now);
void av_rtc_write(struct av_rtc *rtc, uint32_t port, uint8_t value);
/* cdef end */

#endif
