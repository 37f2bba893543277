/* The socket device's packets (virtio 1.3 section 5.10.6), both ways. */
#include <string.h>

#include "fuzz.h"
#include "vsock.h"

#define DATA_BYTES 320u /* two of them, next to one another */
#define HEADERS_MAX 3u
#define ROOM_MAX 256u

struct device {
    struct fuzz_guest guest;
    struct fuzz_queue rx, tx;
    uint64_t data_gpa;
};

static struct av_vring_stats stats_of(const struct fuzz_queue *queue)
{
    struct av_vring_stats stats;

    av_vring_statistics(queue->ring, &stats);
    return stats;
}

/* A packet of the driver's, in one segment or two. */
static void offer_packet(struct device *device, struct fuzz_input *in)
{
    uint32_t at = fuzz_u8(in), bytes = AV_VSOCK_HEADER_BYTES + fuzz_u8(in);
    uint32_t says = bytes - AV_VSOCK_HEADER_BYTES + fuzz_below(in, 4) - 1, cut = fuzz_u8(in);
    uint8_t *packet = av_gmem_hva(&device->guest.mem, device->data_gpa + at, bytes);
    struct av_desc segment[2] = { fuzz_segment(device->data_gpa + at, bytes, 0) };

    if (packet != NULL && at + 28 <= DATA_BYTES)
        memcpy(packet + 24, &says, sizeof(says));
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

static void take(struct device *device, struct fuzz_input *in)
{
    struct av_vring_stats before = stats_of(&device->tx), after;
    uint32_t max = 1 + fuzz_below(in, HEADERS_MAX), room = fuzz_u8(in);
    uint8_t *headers = malloc((size_t)max * AV_VSOCK_HEADER_BYTES), *data = malloc(room);
    uint64_t bytes = 0;
    int count;

    CHECK(headers != NULL && data != NULL);
    count = av_vsock_take(device->tx.ring, headers, max, data, room);
    after = stats_of(&device->tx);
    CHECK(count == -EPROTO || (count >= 0 && (uint32_t)count <= max));
    CHECK(after.used - before.used == (uint64_t)(count < 0 ? 0 : count));
    CHECK(count >= 0 || after.fault != AV_FAULT_NONE);
    for (int i = 0; i < count; i++) {
        uint32_t one;

        memcpy(&one, headers + (size_t)i * AV_VSOCK_HEADER_BYTES + 24, sizeof(one));
        bytes += one;
    }
    CHECK(bytes <= room);
    free(headers);
    free(data);
    av_vring_flush(device->tx.ring);
}

static void put(struct device *device, struct fuzz_input *in)
{
    uint32_t bytes = fuzz_u16(in) % 1000;
    uint8_t *header = calloc(1, AV_VSOCK_HEADER_BYTES), *data = calloc(1, bytes);
    struct av_vring_stats before = stats_of(&device->rx), after;
    int64_t put;

    CHECK(header != NULL && data != NULL);
    if (bytes == 0) {
        put = av_vsock_put_header(device->rx.ring, header);
        CHECK(put == 0 || put == 1 || put == -EPROTO);
    } else {
        put = av_vsock_put(device->rx.ring, header, data, bytes);
        CHECK(put == -EPROTO || (put >= 0 && put <= bytes));
    }
    after = stats_of(&device->rx);
    CHECK(put <= 0 || after.used != before.used);
    CHECK(after.chains - after.used - (before.chains - before.used) <= 1);
    free(header);
    free(data);
    av_vring_flush(device->rx.ring);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input in = { data, size };
    uint8_t bits = fuzz_u8(&in);
    struct device device = { 0 };

    fuzz_guest_init(&device.guest);
    fuzz_queue_init(&device.rx, &device.guest, &in, bits & 1);
    fuzz_queue_init(&device.tx, &device.guest, &in, bits & 1);
    device.data_gpa = fuzz_guest_add_data(&device.guest, DATA_BYTES);
    fuzz_guest_add_data(&device.guest, DATA_BYTES);
    while (fuzz_more(&in))
        switch (fuzz_below(&in, 10)) {
        case 0:
        case 1:
            offer_packet(&device, &in);
            break;
        case 2:
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
            fuzz_queue_restart(fuzz_u8(&in) & 1 ? &device.rx : &device.tx);
            break;
        case 7:
            put(&device, &in);
            break;
        default:
            take(&device, &in);
        }
    fuzz_queue_fini(&device.rx);
    fuzz_queue_fini(&device.tx);
    fuzz_guest_fini(&device.guest);
    return 0;
}
