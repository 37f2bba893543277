/* Bytes over virtqueues, as consoles have them (virtio 1.3 section 5.3.6), both ways; and the
 * entropy device, whose buffers are filled alike (section 5.4). */
#include <string.h>

#include "fuzz.h"
#include "host.h"
#include "rng.h"
#include "stream.h"

#define DATA_BYTES 320u /* two of them, next to one another */

struct device {
    struct fuzz_guest guest;
    struct fuzz_queue queue;
    struct av_stream *stream;
    struct av_rng *rng; /* in its place */
    uint64_t lost; /* chains forgotten in earlier lives of the ring */
};

static struct av_vring_stats stats_of(const struct device *device)
{
    struct av_vring_stats stats;

    av_vring_statistics(device->queue.ring, &stats);
    return stats;
}

/* Nothing stays taken but what broke the ring. */
static void check(const struct device *device)
{
    struct av_vring_stats stats = stats_of(device);

    CHECK(stats.chains - stats.used - device->lost == (stats.fault == AV_FAULT_REQUEST));
}

static void take(struct device *device, struct fuzz_input *in)
{
    uint32_t room = fuzz_u16(in) % 600, taken = UINT32_MAX;
    uint8_t *to = malloc(room);
    int result = av_stream_take(device->stream, to, room, &taken);

    CHECK(taken <= room);
    CHECK(result == 0 || result == 1 || result == -EPROTO);
    CHECK(result != -EPROTO || stats_of(device).fault != AV_FAULT_NONE);
    free(to);
}

static void put(struct device *device, struct fuzz_input *in)
{
    uint32_t count = fuzz_u16(in) % 600, taken = UINT32_MAX;
    uint8_t *from = calloc(1, count);
    int result = av_stream_put(device->stream, from, count, &taken);

    CHECK(taken <= count);
    CHECK(result == (taken == count ? 0 : 1) || result == -EPROTO);
    CHECK(result != -EPROTO || stats_of(device).fault != AV_FAULT_NONE);
    free(from);
}

static void run_rng(struct device *device)
{
    struct av_lane *lane = av_rng_lane(device->rng);
    int rested;

    CHECK(av_lane_start(lane) == 0);
    av_home_turn(fuzz_home());
    rested = av_lane_hold(lane);
    CHECK(rested == 1);
    CHECK(av_lane_error(lane) == 0 || av_lane_error(lane) == -EPROTO);
}

static void create(struct device *device, struct fuzz_input *in)
{
    uint8_t bits = fuzz_u8(in);
    int error;

    fuzz_guest_init(&device->guest);
    fuzz_queue_init(&device->queue, &device->guest, in, bits & 1);
    fuzz_guest_add_data(&device->guest, DATA_BYTES);
    fuzz_guest_add_data(&device->guest, DATA_BYTES);
    if (bits & 2)
        device->rng = av_rng_create(fuzz_home(), device->queue.ring, &error);
    else
        device->stream = av_stream_create(device->queue.ring);
    CHECK(device->rng != NULL || device->stream != NULL);
}

static void destroy(struct device *device)
{
    if (device->rng != NULL)
        av_rng_destroy(device->rng);
    av_stream_destroy(device->stream);
    fuzz_queue_fini(&device->queue);
    fuzz_guest_fini(&device->guest);
}

static void restart(struct device *device)
{
    struct av_vring_stats stats = stats_of(device);

    device->lost = stats.chains - stats.used;
    fuzz_queue_restart(&device->queue);
    if (device->stream != NULL)
        av_stream_forget(device->stream);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input in = { data, size };
    struct device device = { 0 };

    create(&device, &in);
    while (fuzz_more(&in)) {
        uint32_t op = fuzz_below(&in, 8);

        if (op < 4)
            fuzz_queue_step(&device.queue, &in);
        else if (op == 7)
            restart(&device);
        else if (device.rng != NULL)
            run_rng(&device);
        else if (op < 6)
            take(&device, &in);
        else
            put(&device, &in);
        check(&device);
    }
    destroy(&device);
    return 0;
}
