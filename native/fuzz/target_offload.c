/* What a driver leaves to its device (virtio 1.3 section 5.1.6.2): headers and frames of any kind,
 * and of those that are taken the segments, against sums made the slow way. */
#include <string.h>

#include "frames.h"
#include "fuzz.h"
#include "offload.h"

#define FRAME_MAX_BYTES 1500u
#define TCP_CSUM 16u
#define TCP_BYTES 20u

/* RFC 1071, a byte after the other. */
static uint16_t slow_sum(const uint8_t *from, uint32_t bytes)
{
    uint32_t sum = 0;

    for (uint32_t i = 0; i < bytes; i++)
        sum += i % 2 == 0 ? (uint32_t)from[i] << 8 : from[i];
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)sum;
}

static uint32_t be32(const uint8_t *at)
{
    return (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
}

static void put_be16(uint8_t *at, uint32_t value)
{
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}

/* Put enough sense into header and frame that they may be a TCP packet to be segmented. */
static void make_tcp(uint8_t *header, uint8_t *frame, uint32_t bytes, struct fuzz_input *in)
{
    bool six = fuzz_u8(in) & 1;
    uint32_t tags = fuzz_below(in, 3), ip = 14 + 4 * tags, ip_bytes = six ? 40 : 20;
    uint32_t tcp = ip + ip_bytes;

    if (bytes < tcp + TCP_BYTES)
        return;
    header[0] = 1;
    header[1] = six ? 4 : 1;
    header[6] = (uint8_t)tcp;
    header[7] = 0;
    header[8] = TCP_CSUM;
    header[9] = 0;
    for (uint32_t i = 0; i < tags; i++)
        put_be16(frame + 12 + 4 * i, 0x8100);
    put_be16(frame + ip - 2, six ? 0x86dd : 0x0800);
    frame[ip] = six ? 0x60 : 0x45;
    if (!six)
        frame[ip + 9] = 6;
    frame[tcp + 12] = (uint8_t)(0x50 + 16 * fuzz_below(in, 11));
}

/* The checksum of a segment: that of its bytes and of the pseudo header, whose sum for the whole
 * frame the driver had put in its place, with the lengths exchanged. */
static void check_tcp_sum(const struct av_offload *offload, const uint8_t *frame, uint32_t bytes,
                          const uint8_t *segment, uint32_t length)
{
    uint32_t start = offload->csum_start, at = offload->csum_at;
    uint32_t pseudo = ((uint32_t)frame[at] << 8 | frame[at + 1]) +
                      (0xffff - ((bytes - start) & 0xffff)) + (length - start);
    uint8_t carried[2];
    uint32_t sum;

    while (pseudo >> 16)
        pseudo = (pseudo & 0xffff) + (pseudo >> 16);
    put_be16(carried, pseudo);
    sum = (uint32_t)slow_sum(segment + start, length - start) + slow_sum(carried, 2);
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    CHECK(sum == 0xffff || sum == 0);
}

static void check_ip(const struct av_offload *offload, const uint8_t *segment, uint32_t length)
{
    const uint8_t *ip = segment + offload->ip_at;
    uint32_t ip_bytes = offload->csum_start - offload->ip_at;

    if (offload->needs & AV_OFFLOAD_TSO6) {
        CHECK(((uint32_t)ip[4] << 8 | ip[5]) == ((length - offload->ip_at - 40) & 0xffff));
        return;
    }
    CHECK(((uint32_t)ip[2] << 8 | ip[3]) == length - offload->ip_at);
    CHECK(slow_sum(ip, ip_bytes) == 0xffff);
}

static void check_segments(const struct av_offload *offload, const uint8_t *frame, uint32_t bytes)
{
    uint32_t at = offload->headers, sequence = be32(frame + offload->csum_start + 4);

    CHECK(offload->segment_bytes != 0 && offload->headers < bytes);
    CHECK(offload->headers >= offload->csum_start + TCP_BYTES);
    for (uint32_t i = 0; i < offload->segments; i++) {
        uint8_t *to = malloc((size_t)offload->headers + offload->segment_bytes);
        uint32_t length, payload;

        CHECK(to != NULL);
        length = av_offload_segment(offload, frame, bytes, i, to);
        CHECK(length > offload->headers && length <= offload->headers + offload->segment_bytes);
        payload = length - offload->headers;
        CHECK(payload <= bytes - at);
        CHECK(memcmp(to + offload->headers, frame + at, payload) == 0);
        CHECK(be32(to + offload->csum_start + 4) == (uint32_t)(sequence + at - offload->headers));
        check_ip(offload, to, length);
        check_tcp_sum(offload, frame, bytes, to, length);
        at += payload;
        free(to);
    }
    CHECK(at == bytes);
}

static void check_checksum(const struct av_offload *offload, uint8_t *frame, uint32_t bytes)
{
    uint32_t start = offload->csum_start, at = offload->csum_at;
    uint16_t sum = (uint16_t)~slow_sum(frame + start, bytes - start);

    CHECK(at >= start && at + 2 <= bytes);
    av_offload_checksum(offload, frame, bytes);
    CHECK(((uint32_t)frame[at] << 8 | frame[at + 1]) == (sum == 0 ? 0xffff : sum));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input in = { data, size };
    uint8_t header[AV_VNET_BYTES], again[AV_VNET_BYTES];
    bool tcp = fuzz_u8(&in) & 1;
    uint32_t bytes = fuzz_u16(&in) % FRAME_MAX_BYTES;
    uint8_t *frame = malloc(bytes);
    struct av_offload offload, second;

    CHECK(frame != NULL || bytes == 0);
    fuzz_bytes(&in, header, sizeof(header));
    if (tcp) {
        struct fuzz_input rest = in;

        fuzz_bytes(&rest, frame, bytes);
        make_tcp(header, frame, bytes, &in);
    } else {
        fuzz_bytes(&in, frame, bytes);
    }
    if (av_offload_parse(header, frame, bytes, &offload)) {
        CHECK(offload.needs == av_offload_needs(header));
        av_offload_header(&offload, again);
        CHECK(av_offload_parse(again, frame, bytes, &second));
        CHECK(second.needs == offload.needs && second.segments == offload.segments &&
              second.headers == offload.headers && second.csum_at == offload.csum_at);
        if (offload.segments != 1 || (offload.needs & (AV_OFFLOAD_TSO4 | AV_OFFLOAD_TSO6)))
            check_segments(&offload, frame, bytes);
        else if (offload.needs & AV_OFFLOAD_CSUM)
            check_checksum(&offload, frame, bytes);
    }
    free(frame);
    return 0;
}
