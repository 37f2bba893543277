/* What a driver leaves to its device: checksums and segmentation (virtio 1.3 section 5.1.6.2), done
 * here for a receiver that cannot take a frame as it is. Parsing touches nothing but the frame. */
#ifndef AV_OFFLOAD_H
#define AV_OFFLOAD_H

#include <stdbool.h>
#include <stdint.h>

/* What a receiver takes: as TUNSETOFFLOAD has them. */
#define AV_OFFLOAD_CSUM 1u
#define AV_OFFLOAD_TSO4 2u
#define AV_OFFLOAD_TSO6 4u
#define AV_OFFLOAD_ECN 8u
#define AV_OFFLOAD_USO 96u /* of IPv4, of IPv6 */

struct av_offload {
    uint32_t needs; /* AV_OFFLOAD_* of a receiver that gets it as it is; 0: it is complete */
    uint32_t csum_start, csum_at; /* of the frame */
    uint32_t ip_at;
    uint32_t headers; /* bytes up to TCP's payload, of a frame to be segmented */
    uint16_t segment_bytes;
    uint32_t segments; /* 1: not to be segmented */
};

/* header: 12 bytes. False for what no device could carry out. Only checksums and TCP segmentation
 * are known, as only they are offered. */
bool av_offload_parse(const uint8_t *header, const uint8_t *frame, uint32_t bytes,
                      struct av_offload *out);
/* What the header asks a receiver to take, without looking at the frame. */
uint32_t av_offload_needs(const uint8_t *header);
/* Whether a receiver that takes `offloads` may have a frame with this header (5.1.6.4.1). *flags:
 * the header's, less those that mean nothing to such a receiver. */
bool av_offload_takes(const uint8_t *header, uint32_t offloads, uint8_t *flags);
/* A header that says the same and nothing else. */
void av_offload_header(const struct av_offload *offload, uint8_t *header);
/* Fill in the checksum of a frame with one segment. */
void av_offload_checksum(const struct av_offload *offload, uint8_t *frame, uint32_t bytes);
/* Write segment `index`, complete, to `to`, which holds headers + segment_bytes; its bytes. */
uint32_t av_offload_segment(const struct av_offload *offload, const uint8_t *frame, uint32_t bytes,
                            uint32_t index, uint8_t *to);

#endif
