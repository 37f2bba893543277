/* A switch in memory, and who is behind its ports: frames of any kind, links that lose and delay,
 * ports that come and go, captures. */
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "fuzz.h"
#include "host.h"
#include "switch_internal.h"

#define PORTS 3u
#define QUEUE_BYTES 4096u
#define FRAME_MAX_BYTES 600u
#define ADDRESSES_MAX 16u
#define PORT_ADDRESSES_MAX 5u
#define WALL_NS 1700000000000000000u

struct network {
    struct av_switch *sw;
    struct av_cable *cable[PORTS];
    int port[PORTS]; /* -1: detached */
    uint32_t takes[PORTS]; /* offloads, of who is behind the port */
    int capture_fd;
};

static struct av_cable_end *far(const struct network *network, uint32_t side)
{
    return av_cable_end(network->cable[side], 1);
}

static void attach(struct network *network, uint32_t side)
{
    struct av_cable_end *end = av_cable_end(network->cable[side], 0);
    uint32_t found = 0;

    if (network->port[side] >= 0)
        return;
    av_cable_watch(end, av_switch_event_fd(network->sw));
    /* What a switch takes: it forwards all, and the receiver's cable makes it complete. */
    av_cable_set_offloads(end, AV_OFFLOAD_CSUM | AV_OFFLOAD_TSO4 | AV_OFFLOAD_TSO6 | AV_OFFLOAD_ECN);
    av_cable_set_up(end, 1);
    network->port[side] = av_switch_attach(network->sw, end, QUEUE_BYTES);
    CHECK(network->port[side] >= 0);
    for (uint32_t i = 0; i < PORTS; i++)
        found += network->port[i] == network->port[side];
    CHECK(found == 1);
}

static void detach(struct network *network, uint32_t side)
{
    if (network->port[side] < 0)
        return;
    av_cable_watch(av_cable_end(network->cable[side], 0), -1);
    av_switch_detach(network->sw, (uint32_t)network->port[side]);
    network->port[side] = -1;
}

static void create(struct network *network, struct fuzz_input *in)
{
    struct av_switch_setup setup = {
        .seed = fuzz_u8(in),
        .age_ns = 2000000000u,
        .addresses_max = ADDRESSES_MAX,
        .port_addresses_max = PORT_ADDRESSES_MAX,
    };
    int error;

    network->sw = av_switch_create(&setup, &error);
    CHECK(network->sw != NULL);
    network->capture_fd = open("/dev/null", O_WRONLY | O_CLOEXEC);
    CHECK(network->capture_fd >= 0);
    memset(network->port, -1, sizeof(network->port));
    for (uint32_t side = 0; side < PORTS; side++) {
        network->cable[side] = av_cable_create(2 * QUEUE_BYTES, &error);
        CHECK(network->cable[side] != NULL);
        av_cable_set_up(far(network, side), 1);
        attach(network, side);
    }
}

/* From and to one of a few addresses, with a header that asks for anything. */
static void send(struct network *network, struct fuzz_input *in)
{
    uint32_t side = fuzz_below(in, PORTS), bytes = fuzz_u16(in) % FRAME_MAX_BYTES, length = bytes;
    uint8_t header[AV_VNET_BYTES] = { 0 }, *frame = calloc(1, bytes + 64);
    uint8_t how = fuzz_u8(in);

    CHECK(frame != NULL);
    fuzz_bytes(in, frame + 26, how & 31);
    frame[5] = fuzz_u8(in);
    frame[11] = fuzz_u8(in);
    frame[0] = frame[5] == 0xff ? 0xff : 2;
    frame[6] = frame[11] == 0xff ? 3 : 2;
    if (how & 0x80) { /* TCP over IPv4, to be segmented */
        memcpy(frame + 12, "\x08\x00\x45", 3);
        frame[23] = 6;
        frame[46] = 0x50;
        memcpy(header, (const uint8_t[]){ 1, 1, 54, 0, how & 127, 0, 34, 0, 16, 0 }, 10);
    } else if (how & 0x40) {
        fuzz_bytes(in, header, sizeof(header));
    }
    CHECK(av_cable_send(far(network, side), header, frame, &length, 1) >= 0);
    free(frame);
}

static void take(struct network *network, uint32_t side)
{
    const struct av_frame *frame = av_cable_front(far(network, side));
    struct av_offload offload;

    if (frame == NULL)
        return;
    CHECK(frame->bytes >= AV_FRAME_MIN_BYTES && frame->bytes <= FRAME_MAX_BYTES + 64);
    CHECK((frame->data[6] & 1) == 0);
    CHECK(av_offload_parse(frame->header, frame->data, frame->bytes, &offload));
    CHECK((offload.needs & ~network->takes[side]) == 0);
    av_cable_pop(far(network, side));
}

static void check(const struct network *network)
{
    struct av_switch_stats stats;
    uint32_t addresses = 0;

    CHECK(av_switch_statistics(network->sw, &stats) == 0);
    CHECK(stats.flooded + stats.same_port <= stats.frames);
    for (uint32_t side = 0; side < PORTS; side++) {
        struct av_switch_port_stats port;
        uint32_t known = 0;

        if (network->port[side] < 0)
            continue;
        av_switch_port_statistics(network->sw, (uint32_t)network->port[side], &port);
        for (uint32_t i = 0; i < network->sw->table.sets * 8; i++)
            known += network->sw->table.address[i].port == (uint32_t)network->port[side];
        CHECK(port.addresses == known && known <= PORT_ADDRESSES_MAX);
        addresses += known;
    }
    CHECK(stats.addresses == addresses && addresses <= ADDRESSES_MAX);
}

static void turn(struct network *network)
{
    uint64_t next_ns = 0;

    av_switch_turn(network->sw, fuzz_now_ns, WALL_NS + fuzz_now_ns, &next_ns);
    check(network);
}

static void set_link(struct network *network, uint32_t side, struct fuzz_input *in)
{
    uint8_t bits = fuzz_u8(in);
    struct av_switch_link link = {
        .delay_ns = bits & 1 ? fuzz_u8(in) * 1000000u : 0,
        .jitter_ns = bits & 2 ? fuzz_u8(in) * 1000000u : 0,
        .bytes_per_s = bits & 4 ? 1000u + fuzz_u16(in) : 0,
        .loss = bits & 8 ? (uint64_t)fuzz_u8(in) << 24 : 0,
    };

    if (network->port[side] >= 0)
        CHECK(av_switch_set_link(network->sw, (uint32_t)network->port[side], &link) == 0);
}

static void change(struct network *network, struct fuzz_input *in)
{
    uint8_t how = fuzz_u8(in);
    uint32_t side = (how >> 4) % PORTS;

    switch (how & 7) {
    case 0:
        set_link(network, side, in);
        break;
    case 1:
        detach(network, side);
        break;
    case 2:
        attach(network, side);
        break;
    case 3:
        if (network->port[side] >= 0)
            av_switch_cut(network->sw, (uint32_t)network->port[side]);
        break;
    case 4:
        av_cable_set_up(far(network, side), how >> 3 & 1);
        break;
    case 5:
        while (av_cable_front(far(network, side)) != NULL)
            take(network, side);
        network->takes[side] = fuzz_u8(in) & 15;
        av_cable_set_offloads(far(network, side), network->takes[side]);
        break;
    case 6:
        av_switch_capture(network->sw, how & 8 ? network->capture_fd : -1, fuzz_u8(in),
                          how & 16 ? 1000 : 0);
        break;
    default:
        fuzz_now_ns += fuzz_u8(in) * 20000000u;
    }
    check(network);
}

static void destroy(struct network *network)
{
    av_switch_destroy(network->sw);
    for (uint32_t side = 0; side < PORTS; side++)
        av_cable_destroy(network->cable[side]);
    close(network->capture_fd);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input in = { data, size };
    struct network network = { 0 };

    fuzz_now_ns = 1;
    create(&network, &in);
    while (fuzz_more(&in)) {
        uint32_t op = fuzz_below(&in, 8);

        if (op < 3)
            send(&network, &in);
        else if (op == 3)
            take(&network, fuzz_below(&in, PORTS));
        else if (op < 6)
            turn(&network);
        else
            change(&network, &in);
    }
    destroy(&network);
    return 0;
}
