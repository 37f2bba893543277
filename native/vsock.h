/* The socket device's packets: between a ring and plain memory, many with one call (virtio 1.3
 * section 5.10.6). Of a header nothing but its length is looked at here. */
#ifndef AV_VSOCK_H
#define AV_VSOCK_H

#include <stdint.h>

#include "vring.h"

#define AV_VSOCK_HEADER_BYTES 44u

/* cdef begin */
/* Take up to `max` packets off the transmit ring and give their chains back: headers one after the
 * other into `headers`, payloads one after the other into data[0..room). Ends early before a
 * payload that does not fit in what is left. How many, 0 none; -EPROTO when the first of them, or
 * the ring, is broken: shorter than a header, than its length, or longer than room. */
int av_vsock_take(struct av_vring *ring, uint8_t *headers, uint32_t max, uint8_t *data,
                  uint32_t room);
/* Put a payload into the receive ring, in as many packets as the driver's buffers make of it, each
 * with this header and its own length. How many bytes found room, or -EPROTO. */
int64_t av_vsock_put(struct av_vring *ring, const uint8_t *header, const uint8_t *data,
                     uint32_t bytes);
/* The same of a packet that is only a header. 1, 0 no room, or -EPROTO. */
int av_vsock_put_header(struct av_vring *ring, const uint8_t *header);
/* cdef end */

#endif
