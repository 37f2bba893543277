/* A guest of a socket device (virtio 1.3 section 5.10): one stream either way, or connections that
 * come and go. It does as Linux does: buffers of a page with their headers apart, packets of up to
 * 64 KiB, and word of what it has read when the host knows of little room. */
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

#include "load_internal.h"
#include "vdriver_internal.h"

#define CID_HOST 2u
#define TYPE_STREAM 1u
#define BUF_ALLOC (256u * 1024)
#define TELL_BELOW (64u * 1024)
#define RX_BYTES 4096u
#define RX_SLOTS 128u
#define TX_SLOTS 32u
#define TX_BYTES (64u * 1024)
#define SHUTDOWN_BOTH 3u

enum op { REQUEST = 1, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST };

struct header {
    uint64_t src_cid;
    uint64_t dst_cid;
    uint32_t src_port;
    uint32_t dst_port;
    uint32_t len;
    uint16_t type;
    uint16_t op;
    uint32_t flags;
    uint32_t buf_alloc;
    uint32_t fwd_cnt;
} __attribute__((packed));
_Static_assert(sizeof(struct header) == 44, "struct virtio_vsock_hdr");

#define STRIDE(bytes) (((bytes) + sizeof(struct header) + 63) & ~(uint64_t)63)
#define ROOM_BYTES (RX_SLOTS * STRIDE(RX_BYTES) + TX_SLOTS * STRIDE(TX_BYTES))

struct guest {
    struct av_vdriver *rx;
    struct av_vdriver *tx;
    const struct av_load_vsock *load;
    uint8_t *data;
    uint64_t data_gpa;
    uint32_t free_slot[TX_SLOTS];
    uint32_t free_slots;
    bool open;
    bool closing;
    uint32_t host_alloc, host_fwd; /* what the host says */
    uint32_t sent, received, told; /* modulo 2^32, as in headers */
    uint64_t left;                 /* bytes to be sent */
    uint64_t came;                 /* bytes, or connections */
    uint64_t asked;                /* connections */
    uint32_t unanswered;           /* of those, at once */
    uint64_t packets;
    bool done;
};

uint64_t av_load_vsock_room(void)
{
    return (ROOM_BYTES + 4095) & ~4095ull;
}

static uint64_t rx_at(uint32_t slot)
{
    return slot * STRIDE(RX_BYTES);
}

static uint64_t tx_at(uint32_t slot)
{
    return RX_SLOTS * STRIDE(RX_BYTES) + slot * STRIDE(TX_BYTES);
}

static void offer(struct guest *guest, uint32_t slot)
{
    uint64_t gpa = guest->data_gpa + rx_at(slot);
    struct av_vdriver_segment pieces[2] = {
        { .gpa = gpa, .size_bytes = sizeof(struct header) },
        { .gpa = gpa + sizeof(struct header), .size_bytes = RX_BYTES },
    };

    av_vdriver_add(guest->rx, pieces, 0, 2, slot);
}

/* Take back what the device has read; -EPROTO or 0. */
static int reap(struct guest *guest)
{
    uint32_t slot, written;
    int taken;

    while ((taken = av_vdriver_take(guest->tx, &slot, &written)) > 0)
        guest->free_slot[guest->free_slots++] = slot;
    return taken;
}

/* A packet, when there is a slot for it. */
static bool send(struct guest *guest, enum op op, uint32_t port, uint32_t bytes)
{
    struct header *header;
    uint64_t at;
    uint32_t slot;

    if (guest->free_slots == 0)
        return false;
    slot = guest->free_slot[--guest->free_slots];
    at = tx_at(slot);
    header = (struct header *)(guest->data + at);
    *header = (struct header){ .src_cid = guest->load->cid,
                               .dst_cid = CID_HOST,
                               .src_port = port,
                               .dst_port = guest->load->host_port,
                               .len = bytes,
                               .type = TYPE_STREAM,
                               .op = (uint16_t)op,
                               .flags = op == SHUTDOWN ? SHUTDOWN_BOTH : 0,
                               .buf_alloc = BUF_ALLOC,
                               .fwd_cnt = guest->received };
    struct av_vdriver_segment pieces[2] = {
        { .gpa = guest->data_gpa + at, .size_bytes = sizeof(*header) },
        { .gpa = guest->data_gpa + at + sizeof(*header), .size_bytes = bytes },
    };
    av_vdriver_add(guest->tx, pieces, bytes != 0 ? 2 : 1, 0, slot);
    guest->told = guest->received;
    guest->packets++;
    return true;
}

static void on_stream_packet(struct guest *guest, const struct header *header)
{
    switch (header->op) {
    case RESPONSE:
        guest->open = true;
        break;
    case RW:
        guest->received += header->len;
        guest->came += header->len;
        break;
    case SHUTDOWN:
        guest->done = header->flags == SHUTDOWN_BOTH && send(guest, RST, header->dst_port, 0);
        break;
    case RST:
        guest->done = true;
        break;
    default:
        break;
    }
}

static void on_packet(struct guest *guest, const struct header *header)
{
    guest->host_alloc = header->buf_alloc;
    guest->host_fwd = header->fwd_cnt;
    guest->packets++;
    if (guest->load->connections == 0) {
        on_stream_packet(guest, header);
    } else if (header->op == RESPONSE) {
        send(guest, SHUTDOWN, header->dst_port, 0);
    } else if (header->op == RST) {
        guest->unanswered--;
        guest->came++;
    }
}

/* Take what the host sent; how many packets, or -EPROTO. */
static int receive(struct guest *guest)
{
    uint32_t slot, written;
    int taken, count = 0;

    while ((taken = av_vdriver_take(guest->rx, &slot, &written)) > 0) {
        on_packet(guest, (const struct header *)(guest->data + rx_at(slot)));
        offer(guest, slot);
        count++;
    }
    return taken < 0 ? taken : count;
}

/* Send what may be sent. */
static void stream(struct guest *guest)
{
    while (guest->open && guest->left != 0) {
        uint32_t room = guest->host_alloc - (guest->sent - guest->host_fwd);
        uint32_t bytes = guest->left < TX_BYTES ? (uint32_t)guest->left : TX_BYTES;

        if (bytes > room)
            bytes = room;
        if (bytes == 0 || !send(guest, RW, 1, bytes))
            return;
        guest->sent += bytes;
        guest->left -= bytes;
    }
    if (guest->open && guest->load->sends && !guest->closing)
        guest->closing = send(guest, SHUTDOWN, 1, 0);
    if (BUF_ALLOC - (guest->received - guest->told) < TELL_BELOW)
        send(guest, CREDIT_UPDATE, 1, 0);
}

static void connect_more(struct guest *guest)
{
    const struct av_load_vsock *load = guest->load;

    /* Each may need a slot for its end too. */
    while (guest->asked < load->connections && guest->unanswered < load->at_once &&
           guest->free_slots > guest->unanswered) {
        if (!send(guest, REQUEST, (uint32_t)guest->asked + 1, 0))
            return;
        guest->asked++;
        guest->unanswered++;
    }
    guest->done = guest->came == load->connections;
}

/* Wait for the device; 0, -ETIMEDOUT or -errno. */
static int wait(struct guest *guest)
{
    struct pollfd fd = { .fd = guest->rx->call_fd, .events = POLLIN };
    int ready = poll(&fd, 1, (int)(guest->load->timeout_ns / 1000000u));
    uint64_t count;

    if (ready < 0)
        return errno == EINTR ? 0 : -errno;
    if (ready == 0)
        return -ETIMEDOUT;
    return read(fd.fd, &count, sizeof(count)) < 0 && errno != EAGAIN ? -errno : 0;
}

static int run(struct guest *guest)
{
    int result;

    if (guest->load->connections == 0 && !send(guest, REQUEST, 1, 0))
        return -EINVAL;
    while (!guest->done) {
        if ((result = reap(guest)) < 0 || (result = receive(guest)) < 0)
            return result;
        if (guest->load->connections == 0)
            stream(guest);
        else
            connect_more(guest);
        av_vdriver_publish(guest->rx);
        av_vdriver_publish(guest->tx);
        if (result > 0 || guest->done)
            continue;
        if ((av_vdriver_interrupts_on(guest->rx) | av_vdriver_interrupts_on(guest->tx)) == 0 &&
            (result = wait(guest)) < 0)
            return result;
    }
    return 0;
}

int av_load_vsock_run(struct av_vdriver *rx, struct av_vdriver *tx, const struct av_gmem *mem,
                      uint64_t data_gpa, const struct av_load_vsock *load,
                      struct av_load_result *out)
{
    struct guest guest = { .rx = rx, .tx = tx, .load = load, .data_gpa = data_gpa };
    uint64_t began_ns = av_load_now_ns();
    int result;

    memset(out, 0, sizeof(*out));
    guest.data = av_gmem_hva(mem, data_gpa, ROOM_BYTES);
    if (guest.data == NULL || rx->call_fd < 0 || rx->call_fd != tx->call_fd ||
        load->at_once > TX_SLOTS / 2)
        return -EINVAL;
    guest.left = load->sends;
    for (uint32_t slot = 0; slot < TX_SLOTS; slot++)
        guest.free_slot[guest.free_slots++] = slot;
    for (uint32_t slot = 0; slot < RX_SLOTS; slot++)
        offer(&guest, slot);
    av_vdriver_publish(rx);
    result = run(&guest);
    out->elapsed_ns = av_load_now_ns() - began_ns;
    out->requests = load->sends != 0 ? load->sends - guest.left : guest.came;
    out->kicks = rx->stats.kicks + tx->stats.kicks;
    out->interrupts = rx->stats.interrupts + tx->stats.interrupts;
    return result;
}
