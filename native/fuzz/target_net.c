/* A network device's pair on a cable (virtio 1.3 section 5.1.6): a hostile driver, and whoever is
 * at the other end, as another guest, a switch or a program may be. */
#include <string.h>

#include "fuzz.h"
#include "host.h"
#include "net_internal.h"
#include "offload.h"

#define QUEUE_BYTES 16384u
#define DATA_BYTES 1024u /* two of them, next to one another */
#define FRAME_MAX_BYTES 1536u
#define TCP_AT 34u

struct nic {
    struct fuzz_guest guest;
    struct fuzz_queue rx, tx;
    struct av_cable *cable;
    struct av_cable_end *own, *peer;
    struct av_net *net;
    uint32_t peer_takes; /* offloads */
    bool mergeable;
    uint32_t mtu; /* 0: not negotiated */
    uint64_t data_gpa;
};

static void create(struct nic *nic, struct fuzz_input *in)
{
    uint8_t bits = fuzz_u8(in);
    int error;

    fuzz_guest_init(&nic->guest);
    fuzz_queue_init(&nic->rx, &nic->guest, in, bits & 1);
    fuzz_queue_init(&nic->tx, &nic->guest, in, bits & 1);
    nic->data_gpa = fuzz_guest_add_data(&nic->guest, DATA_BYTES);
    fuzz_guest_add_data(&nic->guest, DATA_BYTES);
    nic->mergeable = bits & 2;
    nic->cable = av_cable_create(QUEUE_BYTES, &error);
    CHECK(nic->cable != NULL);
    nic->own = av_cable_end(nic->cable, 0);
    nic->peer = av_cable_end(nic->cable, 1);
    av_cable_set_up(nic->own, 1);
    av_cable_set_up(nic->peer, 1);
    av_cable_set_offloads(nic->own, bits >> 2 & 15);
    nic->net = av_net_create(fuzz_home(), -1, nic->own, nic->rx.ring, nic->tx.ring, &error);
    CHECK(nic->net != NULL);
    nic->mtu = bits & 0x40 ? 68 + fuzz_u8(in) : 0;
    av_net_set_offloads(nic->net, bits >> 2 & 15);
    av_net_start(nic->net, nic->mergeable, 1514, nic->mtu);
    CHECK(av_lane_start(av_net_lane(nic->net)) == 0);
}

/* A packet that may have sense: header, Ethernet, IPv4, TCP, in one segment or two. */
static void offer_packet(struct nic *nic, struct fuzz_input *in)
{
    uint32_t bytes = 64 + fuzz_u16(in) % (DATA_BYTES - 64), cut = fuzz_below(in, 64);
    uint8_t *packet = av_gmem_hva(&nic->guest.mem, nic->data_gpa, bytes);
    uint8_t *frame = packet + AV_NET_HEADER_BYTES;
    uint8_t header[AV_NET_HEADER_BYTES] = { 1, 1 };
    struct av_desc segment[2];

    memcpy(header + 4, &(uint16_t){ fuzz_u8(in) }, 2); /* of a segment's payload */
    header[6] = TCP_AT;
    header[8] = 16;
    memcpy(packet, header, sizeof(header));
    fuzz_bytes(in, frame, 14);
    memcpy(frame + 12, "\x08\x00\x45", 3);
    frame[23] = 6;
    frame[TCP_AT + 12] = 0x50;
    segment[0] = fuzz_segment(nic->data_gpa, cut == 0 ? bytes : cut, 0);
    segment[1] = fuzz_segment(nic->data_gpa + cut, bytes - cut, 0);
    fuzz_queue_offer(&nic->tx, segment, cut == 0 ? 1 : 2);
}

/* Room for packets, as drivers offer it. */
static void offer_room(struct nic *nic, struct fuzz_input *in)
{
    uint32_t at = fuzz_u16(in) % DATA_BYTES, bytes = 1 + fuzz_u8(in) * 8u;
    struct av_desc segment = fuzz_segment(nic->data_gpa + at, bytes, AV_DESC_WRITE);

    fuzz_queue_offer(&nic->rx, &segment, 1);
}

/* The peer sends: with a header that says anything, or none. */
static void send(struct nic *nic, struct fuzz_input *in)
{
    uint8_t header[AV_NET_HEADER_BYTES], how = fuzz_u8(in);
    uint32_t lengths[2] = { fuzz_u16(in) % FRAME_MAX_BYTES, fuzz_u8(in) };
    uint32_t count = 1 + (how & 1), bytes = lengths[0] + (count == 2 ? lengths[1] : 0);
    uint8_t *data = malloc(bytes);
    int sent;

    CHECK(data != NULL || bytes == 0);
    fuzz_bytes(in, header, sizeof(header));
    memset(data, how, bytes);
    fuzz_bytes(in, data, bytes < 18 ? bytes : 18);
    sent = av_cable_send(nic->peer, how & 2 ? header : NULL, data, lengths, count);
    CHECK(sent >= 0 && (uint32_t)sent <= count);
    free(data);
}

/* The peer takes, and looks at what it gets: nothing it has not asked for. */
static void take(struct nic *nic)
{
    const struct av_frame *frame = av_cable_front(nic->peer);
    struct av_offload offload;

    if (frame == NULL)
        return;
    CHECK(frame->bytes >= AV_FRAME_MIN_BYTES && frame->bytes <= AV_FRAME_MAX_BYTES);
    CHECK(av_offload_parse(frame->header, frame->data, frame->bytes, &offload));
    CHECK((offload.needs & ~nic->peer_takes) == 0);
    av_cable_pop(nic->peer);
}

static void check(const struct nic *nic)
{
    const struct av_net_rx *rx = &nic->net->rx;
    struct av_vring_stats stats;
    struct av_net_stats net;
    uint32_t held = 0, segments = 0;

    av_vring_statistics(nic->tx.ring, &stats);
    av_net_statistics(nic->net, &net);
    CHECK(stats.chains == stats.used);
    CHECK(net.tx_packets + net.tx_dropped == stats.used);
    av_vring_statistics(nic->rx.ring, &stats);
    for (uint32_t i = rx->first_held; i != rx->held_end; i++) {
        held += rx->held[i].bytes;
        segments += rx->held[i].iov_count;
    }
    CHECK(held == rx->held_bytes && segments == rx->iov_end - rx->first_iov);
    for (uint32_t i = rx->first_iov; i != rx->iov_end; i++)
        CHECK(fuzz_guest_holds(&nic->guest, rx->iov[i].iov_base, rx->iov[i].iov_len));
}

static void turn(struct nic *nic)
{
    av_lane_lock(av_net_lane(nic->net));
    nic->net->rx.readable = true; /* as an event of the cable would say */
    nic->net->tx.full = !av_cable_has_room(nic->own);
    av_lane_wake(av_net_lane(nic->net));
    av_lane_unlock(av_net_lane(nic->net));
    av_home_turn(fuzz_home());
    check(nic);
}

static void quiesce(struct nic *nic)
{
    uint32_t left = 4;

    while (av_lane_hold(av_net_lane(nic->net)) == 0) {
        CHECK(left-- != 0);
        fuzz_now_ns += 1000000;
        turn(nic);
    }
    av_net_stop(nic->net);
}

static void reset(struct nic *nic, struct fuzz_input *in)
{
    quiesce(nic);
    fuzz_queue_restart(&nic->rx);
    fuzz_queue_restart(&nic->tx);
    nic->mergeable = fuzz_u8(in) & 1;
    av_net_start(nic->net, nic->mergeable, 1514, nic->mtu);
    CHECK(av_lane_start(av_net_lane(nic->net)) == 0);
}

static void set_filter(struct nic *nic, struct fuzz_input *in)
{
    struct av_net_filter filter = { .mac = { 2 } };
    uint8_t bits = fuzz_u8(in);

    filter.promisc = bits & 1;
    filter.allmulti = bits >> 1 & 1;
    filter.alluni = bits >> 2 & 1;
    filter.nobcast = bits >> 3 & 1;
    filter.by_vlan = bits >> 4 & 1;
    filter.addresses = fuzz_below(in, 65);
    fuzz_bytes(in, filter.address, 12);
    av_net_set_filter(nic->net, bits & 0x80 ? NULL : &filter);
}

static void change(struct nic *nic, struct fuzz_input *in)
{
    uint8_t how = fuzz_u8(in);

    switch (how & 7) {
    case 0:
        av_net_set_link(nic->net, how >> 3 & 1);
        break;
    case 1:
        av_cable_set_up(nic->peer, how >> 3 & 1);
        break;
    case 2:
        av_cable_set_patient(nic->peer, how >> 3 & 1);
        break;
    case 3: /* of one that has frames which need more than that */
        while (av_cable_front(nic->peer) != NULL)
            take(nic);
        nic->peer_takes = how >> 3 & 15;
        av_cable_set_offloads(nic->peer, nic->peer_takes);
        break;
    case 4:
        fuzz_now_ns += how * 10000u;
        break;
    case 5:
        set_filter(nic, in);
        break;
    case 6: /* by the control queue, without the cable's knowing at once */
        av_net_set_offloads(nic->net, how >> 3 & 15);
        break;
    default:
        reset(nic, in);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input in = { data, size };
    struct nic nic = { 0 };

    fuzz_now_ns = 0;
    create(&nic, &in);
    while (fuzz_more(&in)) {
        uint32_t op = fuzz_below(&in, 12);

        if (op < 2)
            offer_packet(&nic, &in);
        else if (op < 4)
            offer_room(&nic, &in);
        else if (op < 6)
            send(&nic, &in);
        else if (op == 6)
            take(&nic);
        else if (op == 7)
            fuzz_queue_step(&nic.rx, &in);
        else if (op == 8)
            fuzz_queue_step(&nic.tx, &in);
        else if (op < 11)
            turn(&nic);
        else
            change(&nic, &in);
    }
    quiesce(&nic);
    av_net_destroy(nic.net);
    av_cable_destroy(nic.cable);
    fuzz_queue_fini(&nic.rx);
    fuzz_queue_fini(&nic.tx);
    fuzz_guest_fini(&nic.guest);
    return 0;
}
