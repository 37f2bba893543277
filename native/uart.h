/* A 16550A UART: registers, and the two rings between the guest and the host. */
#ifndef AV_UART_H
#define AV_UART_H

#include <stddef.h>
#include <stdint.h>

/* cdef begin */
struct av_uart_stats {
    uint64_t tx_bytes;
    uint64_t rx_bytes;
    uint64_t interrupts;
    uint64_t tx_full; /* writes that had to wait for the host */
};

struct av_uart;
/* irq_fd: written at each rising edge of the interrupt condition. event_fd: written when the
 * transmit ring turns non-empty, and when a receive ring that refused bytes has room again.
 * Both are borrowed. NULL: errno. */
struct av_uart *av_uart_create(int irq_fd, int event_fd);
void av_uart_destroy(struct av_uart *uart);
/* vCPU threads. offset: 0..7. */
int av_uart_read(struct av_uart *uart, uint32_t offset);
/* vCPU threads. 0, or 1 when the transmit ring is full and the byte was not taken. */
int av_uart_write(struct av_uart *uart, uint32_t offset, uint8_t value);
/* Loop: up to `room` bytes that the guest sent. */
size_t av_uart_take(struct av_uart *uart, uint8_t *to, size_t room);
/* Loop: offer bytes to the guest; how many were taken. */
size_t av_uart_put(struct av_uart *uart, const uint8_t *from, size_t count);
void av_uart_statistics(struct av_uart *uart, struct av_uart_stats *out);
/* cdef end */

#endif
