#include "offload.h"

#include <string.h>

#include "frames.h"

#define F_NEEDS_CSUM 1u
#define F_DATA_VALID 2u
#define GSO_TCPV4 1u
#define GSO_TCPV6 4u
#define GSO_UDP_L4 5u
#define GSO_ECN 0x80u

#define ETHER_BYTES 14u
#define VLAN_BYTES 4u
#define VLAN_TAGS_MAX 2u
#define TYPE_IPV4 0x0800u
#define TYPE_IPV6 0x86ddu
#define TYPE_VLAN 0x8100u
#define TYPE_QINQ 0x88a8u
#define IPV4_BYTES 20u
#define IPV6_BYTES 40u
#define PROTOCOL_TCP 6u
#define TCP_BYTES 20u
#define TCP_CSUM_AT 16u
#define TCP_FIN 0x01u
#define TCP_PSH 0x08u
#define TCP_CWR 0x80u
/* What a sender with the smallest MSS there is (RFC 1122) makes of 64 KiB, and some. */
#define SEGMENTS_MAX 1024u

static uint16_t le16(const uint8_t *at)
{
    return (uint16_t)(at[0] | at[1] << 8);
}

static void put_le16(uint8_t *at, uint32_t value)
{
    at[0] = (uint8_t)value;
    at[1] = (uint8_t)(value >> 8);
}

static uint16_t be16(const uint8_t *at)
{
    return (uint16_t)(at[0] << 8 | at[1]);
}

static void put_be16(uint8_t *at, uint32_t value)
{
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}

static uint32_t be32(const uint8_t *at)
{
    return (uint32_t)be16(at) << 16 | be16(at + 2);
}

static void put_be32(uint8_t *at, uint32_t value)
{
    put_be16(at, value >> 16);
    put_be16(at + 2, value);
}

static uint16_t fold(uint64_t sum)
{
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)sum;
}

/* The Internet checksum's sum (RFC 1071), not inverted: summed in the machine's byte order, which
 * it does not depend on, and swapped once at the end. */
static uint16_t sum_of(const uint8_t *from, uint32_t bytes)
{
    uint64_t sum = 0;
    uint16_t folded;

    for (; bytes >= 4; from += 4, bytes -= 4) {
        uint32_t word;

        memcpy(&word, from, 4);
        sum += word;
    }
    for (; bytes >= 2; from += 2, bytes -= 2) {
        uint16_t word;

        memcpy(&word, from, 2);
        sum += word;
    }
    if (bytes != 0)
        sum += (uint16_t)(from[0]); /* little-endian: the low byte comes first */
    folded = fold(sum);
    return (uint16_t)(folded << 8 | folded >> 8);
}

static bool find_ip(const uint8_t *frame, uint32_t bytes, uint32_t *at, uint16_t *type)
{
    *at = ETHER_BYTES;
    for (uint32_t tags = 0;; tags++) {
        if (*at > bytes)
            return false;
        *type = be16(frame + *at - 2);
        if (*type != TYPE_VLAN && *type != TYPE_QINQ)
            return true;
        if (tags == VLAN_TAGS_MAX)
            return false;
        *at += VLAN_BYTES;
    }
}

/* Whether the IP header before the TCP header at csum_start is one that can be repeated. */
static bool ip_is(const struct av_offload *out, const uint8_t *frame, uint16_t type, uint8_t gso)
{
    const uint8_t *ip = frame + out->ip_at;
    uint32_t bytes = out->csum_start - out->ip_at;

    if (gso == GSO_TCPV4)
        return type == TYPE_IPV4 && bytes >= IPV4_BYTES && ip[0] >> 4 == 4 &&
               (ip[0] & 15u) * 4u == bytes && ip[9] == PROTOCOL_TCP;
    return type == TYPE_IPV6 && bytes >= IPV6_BYTES && ip[0] >> 4 == 6;
}

static bool parse_tcp(uint8_t gso, uint16_t segment_bytes, const uint8_t *frame, uint32_t bytes,
                      struct av_offload *out)
{
    uint32_t tcp_bytes;
    uint16_t type;

    if (!find_ip(frame, bytes, &out->ip_at, &type) || out->csum_start < out->ip_at ||
        out->csum_start + TCP_BYTES > bytes || out->csum_at != out->csum_start + TCP_CSUM_AT)
        return false;
    if (!ip_is(out, frame, type, gso))
        return false;
    tcp_bytes = (frame[out->csum_start + 12u] >> 4) * 4u;
    out->headers = out->csum_start + tcp_bytes;
    if (tcp_bytes < TCP_BYTES || out->headers >= bytes || segment_bytes == 0)
        return false;
    out->segment_bytes = segment_bytes;
    out->segments = (bytes - out->headers + segment_bytes - 1) / segment_bytes;
    return out->segments <= SEGMENTS_MAX;
}

uint32_t av_offload_needs(const uint8_t *header)
{
    uint8_t gso = header[1] & (uint8_t)~GSO_ECN;
    uint32_t needs = header[0] & F_NEEDS_CSUM ? AV_OFFLOAD_CSUM : 0;

    if (gso == GSO_TCPV4)
        needs |= AV_OFFLOAD_TSO4;
    else if (gso == GSO_TCPV6)
        needs |= AV_OFFLOAD_TSO6;
    if (gso != 0 && header[1] & GSO_ECN)
        needs |= AV_OFFLOAD_ECN;
    return needs;
}

bool av_offload_takes(const uint8_t *header, uint32_t offloads, uint8_t *flags)
{
    uint8_t gso = header[1] & (uint8_t)~GSO_ECN;

    *flags = offloads & AV_OFFLOAD_CSUM ? header[0] & (F_NEEDS_CSUM | F_DATA_VALID) : 0;
    if (header[1] & GSO_ECN && !(offloads & AV_OFFLOAD_ECN))
        return false;
    if (gso == GSO_UDP_L4 && !(offloads & AV_OFFLOAD_USO))
        return false;
    if (gso != 0 && gso != GSO_TCPV4 && gso != GSO_TCPV6 && gso != GSO_UDP_L4)
        return false;
    return (av_offload_needs(header) & ~offloads) == 0;
}

bool av_offload_parse(const uint8_t *header, const uint8_t *frame, uint32_t bytes,
                      struct av_offload *out)
{
    uint8_t gso = header[1] & (uint8_t)~GSO_ECN;

    *out = (struct av_offload){ .needs = av_offload_needs(header), .segments = 1 };
    if (gso != 0 && gso != GSO_TCPV4 && gso != GSO_TCPV6)
        return false;
    if (!(out->needs & AV_OFFLOAD_CSUM))
        return gso == 0;
    out->csum_start = le16(header + 6);
    out->csum_at = out->csum_start + le16(header + 8);
    if (out->csum_at + 2u > bytes)
        return false;
    return gso == 0 || parse_tcp(gso, le16(header + 4), frame, bytes, out);
}

void av_offload_header(const struct av_offload *offload, uint8_t *header)
{
    memset(header, 0, AV_VNET_BYTES);
    if (!(offload->needs & AV_OFFLOAD_CSUM))
        return;
    header[0] = F_NEEDS_CSUM;
    put_le16(header + 6, offload->csum_start);
    put_le16(header + 8, offload->csum_at - offload->csum_start);
    if (!(offload->needs & (AV_OFFLOAD_TSO4 | AV_OFFLOAD_TSO6)))
        return;
    header[1] = offload->needs & AV_OFFLOAD_TSO4 ? GSO_TCPV4 : GSO_TCPV6;
    if (offload->needs & AV_OFFLOAD_ECN)
        header[1] |= GSO_ECN;
    put_le16(header + 2, offload->headers);
    put_le16(header + 4, offload->segment_bytes);
}

static void checksum(uint8_t *frame, uint32_t start, uint32_t at, uint32_t bytes)
{
    /* The driver has put the pseudo header's sum where the checksum goes. */
    uint16_t sum = (uint16_t)~sum_of(frame + start, bytes - start);

    /* 0 would say "none" in UDP, and its other form means the same to TCP. */
    put_be16(frame + at, sum != 0 ? sum : 0xffff);
}

void av_offload_checksum(const struct av_offload *offload, uint8_t *frame, uint32_t bytes)
{
    if (offload->needs & AV_OFFLOAD_CSUM)
        checksum(frame, offload->csum_start, offload->csum_at, bytes);
}

static void fix_ip(const struct av_offload *offload, uint8_t *to, uint32_t index, uint32_t length)
{
    uint8_t *ip = to + offload->ip_at;

    if (offload->needs & AV_OFFLOAD_TSO6) {
        put_be16(ip + 4, length - offload->ip_at - IPV6_BYTES);
        return;
    }
    put_be16(ip + 2, length - offload->ip_at);
    put_be16(ip + 4, be16(ip + 4) + index); /* identification */
    put_be16(ip + 10, 0);
    put_be16(ip + 10, (uint16_t)~sum_of(ip, offload->csum_start - offload->ip_at));
}

static void fix_tcp(const struct av_offload *offload, uint8_t *to, uint32_t index, bool last,
                    uint32_t whole, uint32_t length)
{
    uint8_t *tcp = to + offload->csum_start;
    uint64_t sum = be16(tcp + TCP_CSUM_AT);

    put_be32(tcp + 4, be32(tcp + 4) + index * offload->segment_bytes);
    if (index != 0)
        tcp[13] &= (uint8_t)~TCP_CWR;
    if (!last)
        tcp[13] &= (uint8_t) ~(TCP_FIN | TCP_PSH);
    /* The pseudo header's sum holds the length of the whole: put this one's in its place. */
    sum += (uint16_t)~(uint16_t)(whole - offload->csum_start);
    sum += (uint16_t)(length - offload->csum_start);
    put_be16(tcp + TCP_CSUM_AT, fold(sum));
}

uint32_t av_offload_segment(const struct av_offload *offload, const uint8_t *frame, uint32_t bytes,
                            uint32_t index, uint8_t *to)
{
    uint32_t from = offload->headers + index * offload->segment_bytes;
    uint32_t payload = bytes - from < offload->segment_bytes ? bytes - from
                                                             : offload->segment_bytes;
    uint32_t length = offload->headers + payload;

    memcpy(to, frame, offload->headers);
    memcpy(to + offload->headers, frame + from, payload);
    fix_ip(offload, to, index, length);
    fix_tcp(offload, to, index, from + payload == bytes, bytes, length);
    checksum(to, offload->csum_start, offload->csum_at, length);
    return length;
}
