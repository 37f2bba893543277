/* The socket device (virtio 1.3 section 5.10.6): a hostile driver, programs at unix sockets that do
 * what they like, and Python, which takes what is its own and puts packets of its own. */
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fuzz.h"
#include "host.h"
#include "vsock_internal.h"

#define CID 3u
#define DATA_BYTES 320u /* two of them, next to one another */
#define PROGRAMS_MAX 6u
#define CONNECTIONS_MAX 5u
#define UNREAD_MAX 2u
#define LIMIT_NS 1000000000u
#define FATES 8u /* more than there may be of connections */

struct device {
    struct fuzz_guest guest;
    struct fuzz_queue rx, tx;
    struct av_vsock *vsock;
    uint64_t data_gpa;
    uint64_t rx_lost, tx_lost; /* chains that were not given back when their ring broke */
    struct av_vsock_fate fates[FATES];
};

/* The programs' ends of sockets; -1: none. */
static int programs[PROGRAMS_MAX];
static bool refuses;

/* A socket whose one end is a program's, and that is soon full; -1: there are enough. */
static int join(void)
{
    int ends[2], small = 1;

    for (uint32_t i = 0; i < PROGRAMS_MAX; i++) {
        if (programs[i] >= 0)
            continue;
        CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends) == 0);
        for (uint32_t end = 0; end < 2; end++)
            CHECK(setsockopt(ends[end], SOL_SOCKET, SO_SNDBUF, &small, sizeof(small)) == 0);
        programs[i] = ends[1];
        return ends[0];
    }
    return -1;
}

/* In the place of the device's connect(). */
int fuzz_connect(int fd, const struct sockaddr *to, unsigned bytes)
{
    int end = refuses ? -1 : join();

    CHECK(to->sa_family == AF_UNIX && bytes != 0);
    if (end < 0) {
        errno = ECONNREFUSED;
        return -1;
    }
    CHECK(dup2(end, fd) == fd);
    close(end);
    return 0;
}

static struct av_vring_stats stats_of(const struct fuzz_queue *queue)
{
    struct av_vring_stats stats;

    av_vring_statistics(queue->ring, &stats);
    return stats;
}

static uint64_t taken(const struct fuzz_queue *queue)
{
    struct av_vring_stats stats = stats_of(queue);

    return stats.chains - stats.used;
}

/* What is taken is given back, but from a ring that broke. */
static void check_ring(const struct fuzz_queue *queue, uint64_t lost)
{
    CHECK(stats_of(queue).fault != AV_FAULT_NONE || taken(queue) == lost);
}

static void check(const struct device *device)
{
    const struct av_vsock *vsock = device->vsock;
    uint32_t count = 0, waiting = 0, unread = 0;

    check_ring(&device->rx, device->rx_lost);
    check_ring(&device->tx, device->tx_lost);
    for (struct av_vsock_link *at = vsock->all.next; at != &vsock->all; at = at->next) {
        const struct av_vsock_connection *c = av_vsock_of_all(at);

        count++;
        waiting += c->deadline_ns != 0;
        unread += c->unread;
        CHECK(c->unread == (c->held != 0 && c->state != AV_VSOCK_OPEN));
        CHECK(!c->hung_up || c->state != AV_VSOCK_OPEN || c->deadline_ns != 0);
        CHECK(c->held <= c->buffer_bytes && c->buffer_bytes <= AV_VSOCK_BUFFER_BYTES);
        CHECK(c->held_at + c->held <= c->buffer_bytes);
        CHECK(c->received - c->forwarded <= AV_VSOCK_BUFFER_BYTES);
        CHECK(c->sent - c->guest_forwarded <= UINT32_MAX / 2);
        CHECK(c->state != AV_VSOCK_OPEN || c->held == c->received - c->forwarded);
        CHECK(c->named == (c->state != AV_VSOCK_DRAINING));
        CHECK(c->state != AV_VSOCK_CLOSING || c->fd < 0);
        CHECK((c->state != AV_VSOCK_OPEN && c->state != AV_VSOCK_ASKED) || c->fd >= 0);
        CHECK(c->due == 0 || av_vsock_is_linked(&c->ready));
        CHECK(!c->named || av_vsock_find(vsock, c->host_port, c->guest_port) == c);
    }
    CHECK(count == vsock->connections && count <= CONNECTIONS_MAX);
    CHECK(waiting == vsock->waiting);
    CHECK(unread == vsock->unread && unread <= UNREAD_MAX);
    CHECK(vsock->inbox->count <= AV_VSOCK_INBOX_PACKETS);
    CHECK(vsock->inbox->bytes <= AV_VSOCK_BUFFER_BYTES);
}

static void turn(struct device *device)
{
    av_lane_lock(&device->vsock->lane);
    av_lane_wake(&device->vsock->lane);
    av_lane_unlock(&device->vsock->lane);
    av_home_turn(fuzz_home());
    check(device);
}

/* --- the driver ------------------------------------------------------------------------ */

/* Ports that the device chooses begin at 2^30. */
static uint32_t port(struct fuzz_input *in)
{
    uint32_t bits = fuzz_u8(in);

    return (bits & 8 ? 1u << 30 : 0) + (bits & 7);
}

/* A packet that has sense, but for what the input says: in one segment or two. */
static void offer_packet(struct device *device, struct fuzz_input *in)
{
    uint32_t at = fuzz_u8(in), bytes = AV_VSOCK_HEADER_BYTES + fuzz_u8(in), cut = fuzz_u8(in);
    uint8_t *packet = av_gmem_hva(&device->guest.mem, device->data_gpa + at, bytes);
    struct av_desc segment[2] = { fuzz_segment(device->data_gpa + at, bytes, 0) };
    struct av_vsock_header header = {
        .src_cid = CID,
        .dst_cid = AV_VSOCK_CID_HOST,
        .src_port = fuzz_below(in, 4),
        .dst_port = port(in),
        .len = bytes - AV_VSOCK_HEADER_BYTES + fuzz_below(in, 40) / 39,
        .type = AV_VSOCK_TYPE_STREAM,
        .op = (uint16_t)fuzz_below(in, 9),
        .flags = fuzz_u8(in),
        .buf_alloc = fuzz_u8(in) * 32u,
        .fwd_cnt = (uint32_t)fuzz_number(in),
    };
    const struct av_vsock_connection *connection;

    connection = av_vsock_find(device->vsock, header.dst_port, header.src_port);
    if (connection != NULL && !(header.flags & 0x80))
        header.fwd_cnt = connection->sent; /* as one that reads all at once */
    if (packet != NULL)
        memcpy(packet, &header, sizeof(header));
    if (cut != 0 && cut < bytes) {
        segment[0] = fuzz_segment(device->data_gpa + at, cut, 0);
        segment[1] = fuzz_segment(device->data_gpa + at + cut, bytes - cut, 0);
    }
    fuzz_queue_offer(&device->tx, segment, cut != 0 && cut < bytes ? 2 : 1);
}

static void offer_room(struct device *device, struct fuzz_input *in)
{
    uint32_t at = fuzz_u8(in), bytes = fuzz_u8(in);
    struct av_desc segment = fuzz_segment(device->data_gpa + at, bytes, AV_DESC_WRITE);

    fuzz_queue_offer(&device->rx, &segment, 1);
}

static void reset(struct device *device)
{
    CHECK(av_lane_hold(av_vsock_lane(device->vsock)) == 1);
    device->rx_lost = taken(&device->rx);
    device->tx_lost = taken(&device->tx);
    fuzz_queue_restart(&device->rx);
    fuzz_queue_restart(&device->tx);
    av_vsock_reset(device->vsock, AV_VSOCK_DRIVER_RESET);
    check(device);
    CHECK(av_lane_start(av_vsock_lane(device->vsock)) == 0);
}

/* --- programs -------------------------------------------------------------------------- */

static void act(struct fuzz_input *in)
{
    int *program = &programs[fuzz_below(in, PROGRAMS_MAX)];
    uint32_t how = fuzz_u8(in);
    uint8_t data[512];

    memset(data, (int)how, sizeof(data));
    if (*program < 0)
        return;
    switch (how & 7) {
    case 0:
        close(*program);
        *program = -1;
        break;
    case 1:
        shutdown(*program, SHUT_WR);
        break;
    case 2:
        shutdown(*program, SHUT_RD);
        break;
    case 3:
    case 4:
    case 5:
        if (send(*program, data, 1 + how * 2, MSG_NOSIGNAL) < 0)
            CHECK(errno == EAGAIN || errno == EPIPE || errno == ECONNRESET);
        break;
    default:
        if (recv(*program, data, sizeof(data), 0) < 0)
            CHECK(errno == EAGAIN || errno == ECONNRESET);
    }
}

/* --- Python ---------------------------------------------------------------------------- */

static void take(struct device *device)
{
    struct av_vsock_batch batch;
    uint64_t bytes = 0;

    CHECK(av_vsock_receive(device->vsock, &batch) == batch.count);
    for (uint32_t i = 0; i < batch.count; i++) {
        struct av_vsock_header header;

        memcpy(&header, batch.headers + (size_t)i * AV_VSOCK_HEADER_BYTES, sizeof(header));
        bytes += header.len;
    }
    CHECK(bytes == batch.bytes);
}

static void put(struct device *device, struct fuzz_input *in)
{
    uint32_t bytes = fuzz_u16(in) % 1000;
    uint8_t *header = calloc(1, AV_VSOCK_HEADER_BYTES), *data = calloc(1, bytes);
    struct av_vring_stats before = stats_of(&device->rx), after;
    int64_t result;

    CHECK(header != NULL && data != NULL);
    if (bytes == 0) {
        result = av_vsock_put_header(device->vsock, header);
        CHECK(result == 0 || result == 1 || result == -EPROTO);
    } else {
        result = av_vsock_put(device->vsock, header, data, bytes);
        CHECK(result == -EPROTO || (result >= 0 && result <= bytes));
    }
    after = stats_of(&device->rx);
    CHECK(result <= 0 || after.used != before.used);
    free(header);
    free(data);
    av_vsock_flush(device->vsock);
}

/* One that no connection has any more; NULL: none is wanted. */
static struct av_vsock_fate *fate(struct device *device, uint32_t how)
{
    if (!(how & 1))
        return NULL;
    for (uint32_t i = 0; i < FATES; i++)
        if (device->fates[i].lane & AV_VSOCK_GONE) {
            device->fates[i] = (struct av_vsock_fate){ .program = how & 2 ? AV_VSOCK_ABORTED : 0 };
            return &device->fates[i];
        }
    CHECK(false);
    return NULL;
}

/* A program is joined to the guest, asked or asking. */
static void ask(struct device *device, struct fuzz_input *in, uint32_t how)
{
    struct av_vsock_fate *told;
    int fd = join(), result;

    if (fd < 0)
        return;
    told = fate(device, how);
    if (how & 4)
        result = av_vsock_accept(device->vsock, fd, port(in), fuzz_below(in, 4), fuzz_u16(in), told);
    else
        result = av_vsock_ask(device->vsock, fd, fuzz_below(in, 4), told);
    if (told != NULL)
        CHECK(result == 0 || told->lane == 0);
    if (told != NULL && result < 0)
        told->lane = AV_VSOCK_GONE;
}

static void python(struct device *device, struct fuzz_input *in)
{
    uint32_t how = fuzz_u8(in);

    switch (how & 7) {
    case 0:
    case 1:
        take(device);
        break;
    case 2:
        put(device, in);
        break;
    case 3:
        ask(device, in, how >> 3);
        break;
    case 4:
        if (how & 8)
            av_vsock_claim(device->vsock, port(in), fuzz_below(in, 4));
        else
            av_vsock_release(device->vsock, port(in), fuzz_below(in, 4));
        break;
    case 5:
        CHECK(av_vsock_serve(device->vsock, how >> 3 & 7, how >> 6 & 1) == 0);
        break;
    case 6:
        fuzz_now_ns += (uint64_t)how * (LIMIT_NS / 128);
        av_vsock_expire(device->vsock);
        break;
    default:
        refuses = how & 8;
    }
    check(device);
}

/* --- the whole ------------------------------------------------------------------------- */

static void create(struct device *device, struct fuzz_input *in)
{
    const struct av_vsock_setup setup = { .cid = CID,
                                          .path = "/v",
                                          .ask_ns = LIMIT_NS,
                                          .close_ns = LIMIT_NS,
                                          .connections_max = CONNECTIONS_MAX,
                                          .unread_max = UNREAD_MAX };
    uint8_t bits = fuzz_u8(in);
    int error;

    signal(SIGPIPE, SIG_IGN); /* as Python does */
    for (uint32_t i = 0; i < FATES; i++)
        device->fates[i].lane = AV_VSOCK_GONE;
    fuzz_guest_init(&device->guest);
    fuzz_queue_init(&device->rx, &device->guest, in, bits & 1);
    fuzz_queue_init(&device->tx, &device->guest, in, bits & 1);
    device->data_gpa = fuzz_guest_add_data(&device->guest, DATA_BYTES);
    fuzz_guest_add_data(&device->guest, DATA_BYTES);
    device->vsock = av_vsock_create(fuzz_home(), device->rx.ring, device->tx.ring, &setup, &error);
    CHECK(device->vsock != NULL);
    device->vsock->walled = bits & 2;
    CHECK(av_lane_start(av_vsock_lane(device->vsock)) == 0);
}

/* All ends of the device's have gone, so each program comes to an end. */
static void end_program(int fd)
{
    uint8_t data[512];
    ssize_t got;

    while ((got = recv(fd, data, sizeof(data), 0)) > 0)
        continue;
    CHECK(got == 0 || errno == ECONNRESET);
    close(fd);
}

static void destroy(struct device *device)
{
    CHECK(av_lane_hold(av_vsock_lane(device->vsock)) == 1);
    av_vsock_destroy(device->vsock);
    for (uint32_t i = 0; i < FATES; i++)
        CHECK(device->fates[i].lane & AV_VSOCK_GONE);
    for (uint32_t i = 0; i < PROGRAMS_MAX; i++)
        if (programs[i] >= 0)
            end_program(programs[i]);
    fuzz_queue_fini(&device->rx);
    fuzz_queue_fini(&device->tx);
    fuzz_guest_fini(&device->guest);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input in = { data, size };
    struct device device = { 0 };

    fuzz_now_ns = 0;
    refuses = false;
    for (uint32_t i = 0; i < PROGRAMS_MAX; i++)
        programs[i] = -1;
    create(&device, &in);
    while (fuzz_more(&in))
        switch (fuzz_below(&in, 12)) {
        case 0:
        case 1:
        case 2:
            offer_packet(&device, &in);
            break;
        case 3:
            offer_room(&device, &in);
            break;
        case 4:
            fuzz_queue_step(&device.rx, &in);
            break;
        case 5:
            fuzz_queue_step(&device.tx, &in);
            break;
        case 6:
            if (fuzz_u8(&in) < 32)
                reset(&device);
            break;
        case 7:
        case 8:
            act(&in);
            break;
        case 9:
            python(&device, &in);
            break;
        default:
            turn(&device);
        }
    destroy(&device);
    return 0;
}
