#include "uart.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define RING_BYTES 65536u /* a power of two */
#define RX_BURST_BYTES 256u

enum { RBR_THR = 0, IER = 1, IIR_FCR = 2, LCR = 3, MCR = 4, LSR = 5, MSR = 6, SCR = 7 };

#define IER_RDI 0x01
#define IER_THRI 0x02
#define IIR_NONE 0x01
#define IIR_THRE 0x02
#define IIR_RDA 0x04
#define IIR_FIFO 0xc0
#define FCR_ENABLE 0x01
#define LCR_DLAB 0x80
#define MCR_DTR 0x01
#define MCR_RTS 0x02
#define MCR_OUT1 0x04
#define MCR_OUT2 0x08
#define MCR_LOOP 0x10
#define LSR_DR 0x01
#define LSR_THRE 0x20
#define LSR_TEMT 0x40
#define MSR_CTS 0x10
#define MSR_DSR 0x20
#define MSR_RI 0x40
#define MSR_DCD 0x80

struct ring {
    uint32_t head; /* both run freely; their difference is the fill */
    uint32_t tail;
    uint8_t bytes[RING_BYTES];
};

struct av_uart {
    pthread_mutex_t lock; /* registers and rings: vCPUs among themselves, and the loop */
    int irq_fd;
    int event_fd;
    uint8_t ier, fcr, lcr, mcr, scr, dll, dlm;
    bool thre_pending;
    bool line;       /* the interrupt condition as last seen */
    bool rts_used;   /* the guest has raised RTS at least once */
    bool rx_refused; /* put() left bytes with the caller */
    uint32_t burst;  /* received bytes the guest may read now */
    struct av_uart_stats stats;
    struct ring tx, rx;
};

static uint32_t fill(const struct ring *ring)
{
    return ring->head - ring->tail;
}

static void ring_put(struct ring *ring, uint8_t byte)
{
    ring->bytes[ring->head++ & (RING_BYTES - 1)] = byte;
}

static uint8_t ring_take(struct ring *ring)
{
    return ring->bytes[ring->tail++ & (RING_BYTES - 1)];
}

static void signal_fd(int fd)
{
    uint64_t one = 1;

    /* EAGAIN: the counter is full, so the other side is to be woken anyway. */
    if (write(fd, &one, sizeof(one)) < 0)
        return;
}

struct av_uart *av_uart_create(int irq_fd, int event_fd)
{
    struct av_uart *uart = calloc(1, sizeof(*uart));
    if (uart == NULL)
        return NULL;
    pthread_mutex_init(&uart->lock, NULL);
    uart->irq_fd = irq_fd;
    uart->event_fd = event_fd;
    uart->dll = 1; /* 115200 baud, for a guest that reads before it writes */
    uart->lcr = 3;
    return uart;
}

void av_uart_destroy(struct av_uart *uart)
{
    if (uart == NULL)
        return;
    pthread_mutex_destroy(&uart->lock);
    free(uart);
}

static bool may_receive(const struct av_uart *uart)
{
    /* A guest that never touches RTS, as small programs do, does not use it for flow control. */
    return !uart->rts_used || (uart->mcr & MCR_RTS) != 0;
}

static bool data_ready(const struct av_uart *uart)
{
    return uart->burst != 0 && may_receive(uart);
}

/* Received bytes are presented in bursts, and only the loop starts the next one. A guest that
 * finds data ready for ever never leaves its interrupt handler: on one vCPU the reader of the tty
 * would not run, and Linux drops what its 64 KiB of tty buffers cannot hold. The pause of one
 * loop turn between two bursts is what a real line's speed is to a real driver. 256 bytes are
 * what Linux takes in one pass of its handler. */
static void next_burst(struct av_uart *uart)
{
    if (uart->burst == 0) {
        uint32_t waiting = fill(&uart->rx);
        uart->burst = waiting < RX_BURST_BYTES ? waiting : RX_BURST_BYTES;
    }
}

static uint8_t interrupt_id(const struct av_uart *uart)
{
    if ((uart->ier & IER_RDI) && data_ready(uart))
        return IIR_RDA;
    if ((uart->ier & IER_THRI) && uart->thre_pending)
        return IIR_THRE;
    return IIR_NONE;
}

/* The line is an edge to the IOAPIC. An 8250 driver stays in its handler until IIR says that
 * nothing is pending, so the condition falls before the next edge is needed. */
static void update_line(struct av_uart *uart)
{
    bool pending = interrupt_id(uart) != IIR_NONE;

    if (pending && !uart->line) {
        uart->stats.interrupts++;
        signal_fd(uart->irq_fd);
    }
    uart->line = pending;
}

static uint8_t read_receiver(struct av_uart *uart)
{
    uint8_t byte;

    if (!data_ready(uart))
        return 0;
    byte = ring_take(&uart->rx);
    uart->stats.rx_bytes++;
    if (--uart->burst == 0 && (fill(&uart->rx) != 0 || uart->rx_refused))
        signal_fd(uart->event_fd);
    return byte;
}

static uint8_t read_interrupt_id(struct av_uart *uart)
{
    uint8_t id = interrupt_id(uart);

    if (id == IIR_THRE)
        uart->thre_pending = false;
    return id | ((uart->fcr & FCR_ENABLE) ? IIR_FIFO : 0);
}

static uint8_t modem_status(const struct av_uart *uart)
{
    uint8_t mcr = uart->mcr;

    if (!(mcr & MCR_LOOP))
        return MSR_CTS | MSR_DSR | MSR_DCD;
    return (uint8_t)(((mcr & MCR_RTS) ? MSR_CTS : 0) | ((mcr & MCR_DTR) ? MSR_DSR : 0) |
                     ((mcr & MCR_OUT1) ? MSR_RI : 0) | ((mcr & MCR_OUT2) ? MSR_DCD : 0));
}

static uint8_t read_register(struct av_uart *uart, uint32_t offset)
{
    bool divisor = (uart->lcr & LCR_DLAB) != 0;

    switch (offset) {
    case RBR_THR:
        return divisor ? uart->dll : read_receiver(uart);
    case IER:
        return divisor ? uart->dlm : uart->ier;
    case IIR_FCR:
        return read_interrupt_id(uart);
    case LCR:
        return uart->lcr;
    case MCR:
        return uart->mcr;
    case LSR:
        return LSR_THRE | LSR_TEMT | (data_ready(uart) ? LSR_DR : 0);
    case MSR:
        return modem_status(uart);
    default:
        return uart->scr;
    }
}

int av_uart_read(struct av_uart *uart, uint32_t offset)
{
    uint8_t value;

    pthread_mutex_lock(&uart->lock);
    value = read_register(uart, offset);
    update_line(uart);
    pthread_mutex_unlock(&uart->lock);
    return value;
}

/* 1 when there is no room. */
static int transmit(struct av_uart *uart, uint8_t byte)
{
    if (uart->mcr & MCR_LOOP) {
        if (fill(&uart->rx) < RING_BYTES) {
            ring_put(&uart->rx, byte);
            next_burst(uart);
        }
    } else {
        if (fill(&uart->tx) == RING_BYTES) {
            uart->stats.tx_full++;
            return 1;
        }
        if (fill(&uart->tx) == 0)
            signal_fd(uart->event_fd);
        ring_put(&uart->tx, byte);
        uart->stats.tx_bytes++;
    }
    uart->thre_pending = true; /* sent at once, so the holding register is empty again */
    return 0;
}

static int write_register(struct av_uart *uart, uint32_t offset, uint8_t value)
{
    bool divisor = (uart->lcr & LCR_DLAB) != 0;

    switch (offset) {
    case RBR_THR:
        if (!divisor)
            return transmit(uart, value);
        uart->dll = value;
        return 0;
    case IER:
        if (divisor) {
            uart->dlm = value;
        } else {
            /* Enabling it while the register is empty interrupts at once: Linux starts its
             * transmission by that. */
            if ((value & IER_THRI) && !(uart->ier & IER_THRI))
                uart->thre_pending = true;
            uart->ier = value & 0x0f;
        }
        return 0;
    case IIR_FCR:
        /* Clearing the FIFOs drops nothing: bytes the guest has not read count as still on the
         * line, so what a user types ahead survives the driver's start. */
        uart->fcr = value & FCR_ENABLE;
        return 0;
    case LCR:
        uart->lcr = value;
        return 0;
    case MCR:
        uart->mcr = value & 0x1f;
        uart->rts_used |= (value & MCR_RTS) != 0;
        return 0;
    case SCR:
        uart->scr = value;
        return 0;
    default: /* LSR and MSR are read-only */
        return 0;
    }
}

int av_uart_write(struct av_uart *uart, uint32_t offset, uint8_t value)
{
    int full;

    pthread_mutex_lock(&uart->lock);
    full = write_register(uart, offset, value);
    update_line(uart);
    pthread_mutex_unlock(&uart->lock);
    return full;
}

size_t av_uart_take(struct av_uart *uart, uint8_t *to, size_t room)
{
    size_t count = 0;

    pthread_mutex_lock(&uart->lock);
    while (count < room && fill(&uart->tx) != 0)
        to[count++] = ring_take(&uart->tx);
    pthread_mutex_unlock(&uart->lock);
    return count;
}

size_t av_uart_put(struct av_uart *uart, const uint8_t *from, size_t count)
{
    size_t taken = 0;

    pthread_mutex_lock(&uart->lock);
    while (taken < count && fill(&uart->rx) < RING_BYTES)
        ring_put(&uart->rx, from[taken++]);
    uart->rx_refused = taken < count;
    next_burst(uart);
    update_line(uart);
    pthread_mutex_unlock(&uart->lock);
    return taken;
}

void av_uart_statistics(struct av_uart *uart, struct av_uart_stats *out)
{
    pthread_mutex_lock(&uart->lock);
    *out = uart->stats;
    pthread_mutex_unlock(&uart->lock);
}
