/* Captures: classic pcap, with nanoseconds. */
#include "switch_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BUFFER_BYTES (256u * 1024u)
#define MAGIC_NS 0xa1b23c4du
#define LINK_ETHERNET 1u
#define NS_PER_S 1000000000u

struct file_header {
    uint32_t magic;
    uint16_t major, minor;
    uint32_t zone, accuracy;
    uint32_t snap_bytes;
    uint32_t link;
};
_Static_assert(sizeof(struct file_header) == 24, "pcap's file header");

struct record_header {
    uint32_t s, ns;
    uint32_t bytes, wire_bytes;
};
_Static_assert(sizeof(struct record_header) == 16, "pcap's record header");

void av_capture_flush(struct av_switch *sw)
{
    struct av_capture *capture = &sw->capture;
    uint32_t written = 0;

    while (capture->error == 0 && written < capture->buffered) {
        ssize_t result = write(capture->fd, capture->buffer + written,
                               capture->buffered - written);

        if (result > 0)
            written += (uint32_t)result;
        else if (result == 0 || errno != EINTR)
            capture->error = result == 0 ? EIO : errno;
    }
    capture->buffered = 0;
}

static void put(struct av_switch *sw, const void *from, uint32_t bytes)
{
    struct av_capture *capture = &sw->capture;

    if (capture->buffered + bytes > BUFFER_BYTES)
        av_capture_flush(sw);
    memcpy(capture->buffer + capture->buffered, from, bytes);
    capture->buffered += bytes;
    capture->bytes += bytes;
    sw->stats.captured_bytes += bytes;
}

static void record(struct av_switch *sw, const uint8_t *data, uint32_t bytes, uint64_t at_ns)
{
    struct av_capture *capture = &sw->capture;
    uint64_t wall_ns = at_ns + (uint64_t)sw->wall_less_now_ns;
    struct record_header header = {
        .s = (uint32_t)(wall_ns / NS_PER_S),
        .ns = (uint32_t)(wall_ns % NS_PER_S),
        .bytes = bytes < capture->snap_bytes ? bytes : capture->snap_bytes,
        .wire_bytes = bytes,
    };

    if (capture->error != 0 ||
        (capture->max_bytes != 0 &&
         capture->bytes + sizeof(header) + header.bytes > capture->max_bytes)) {
        sw->stats.uncaptured++;
        return;
    }
    put(sw, &header, sizeof(header));
    put(sw, data, header.bytes);
    sw->stats.captured_frames++;
}

void av_capture_frame(struct av_switch *sw, const struct av_transit *frame, uint64_t at_ns)
{
    struct av_offload offload;

    if (!av_offload_parse(frame->header, frame->data, frame->bytes, &offload))
        return;
    if (offload.segments == 1 && offload.needs == 0) {
        record(sw, frame->data, frame->bytes, at_ns);
    } else if (offload.segments == 1) {
        memcpy(sw->scratch, frame->data, frame->bytes);
        av_offload_checksum(&offload, sw->scratch, frame->bytes);
        record(sw, sw->scratch, frame->bytes, at_ns);
    } else {
        for (uint32_t index = 0; index < offload.segments; index++)
            record(sw, sw->scratch,
                   av_offload_segment(&offload, frame->data, frame->bytes, index, sw->scratch),
                   at_ns);
    }
}

int av_capture_stop(struct av_switch *sw)
{
    struct av_capture *capture = &sw->capture;
    int error;

    if (capture->fd >= 0)
        av_capture_flush(sw);
    error = capture->error;
    free(capture->buffer);
    *capture = (struct av_capture){ .fd = -1 };
    return -error;
}

int av_switch_capture(struct av_switch *sw, int fd, uint32_t snap_bytes, uint64_t max_bytes)
{
    struct file_header header = {
        .magic = MAGIC_NS, .major = 2, .minor = 4, .snap_bytes = snap_bytes, .link = LINK_ETHERNET
    };
    int result = av_capture_stop(sw);

    if (fd < 0)
        return result;
    sw->capture.buffer = malloc(BUFFER_BYTES);
    if (sw->capture.buffer == NULL)
        return -ENOMEM;
    sw->capture.fd = fd;
    sw->capture.snap_bytes = snap_bytes;
    sw->capture.max_bytes = max_bytes;
    sw->stats.captured_frames = sw->stats.captured_bytes = sw->stats.uncaptured = 0;
    put(sw, &header, sizeof(header));
    av_capture_flush(sw);
    return -sw->capture.error;
}
