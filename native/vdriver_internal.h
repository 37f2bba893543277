/* Inside of struct av_vdriver, for its split and its packed half. */
#ifndef AV_VDRIVER_INTERNAL_H
#define AV_VDRIVER_INTERNAL_H

#include <stdbool.h>

#include "vdriver.h"

#define DESC_NEXT 1u
#define DESC_WRITE 2u
#define DESC_INDIRECT 4u

/* A descriptor of the split format, which indirect tables of it have as well. */
struct split_desc {
    uint64_t gpa;
    uint32_t len;
    uint16_t flags;
    uint16_t next;
};

struct packed_desc {
    uint64_t gpa;
    uint32_t len;
    uint16_t id;
    uint16_t flags;
};

/* The driver's and the device's event suppression area of a packed ring. */
struct packed_event {
    uint16_t off_wrap;
    uint16_t flags;
};

_Static_assert(sizeof(struct split_desc) == 16, "split descriptor");
_Static_assert(sizeof(struct packed_desc) == 16, "packed descriptor");
_Static_assert(sizeof(struct packed_event) == 4, "event suppression");

/* What we know of a chain in flight, by its head (split) or buffer id (packed). */
struct chain_note {
    uint32_t token;
    uint16_t count; /* descriptors of the ring; 0: not in flight */
    uint16_t last;  /* split: the last of them */
};

struct av_vdriver {
    const struct av_gmem *mem;
    uint8_t *desc;
    uint8_t *driver_area;
    uint8_t *device_area;
    uint8_t *tables; /* NULL without INDIRECT_DESC */
    uint64_t table_gpa;
    uint16_t size;
    uint16_t free; /* descriptors */
    uint16_t *next_free;
    uint16_t first_free;
    bool packed;
    bool event_idx;
    bool avail_wrap;
    bool used_wrap;
    uint16_t next_avail; /* split: counts on; packed: a place in the ring */
    uint16_t next_used;
    uint16_t published;  /* next_avail when the device was last told */
    uint16_t unpublished; /* descriptors since */
    uint16_t head_flags; /* packed: of the first unpublished chain, held back until publish */
    uint16_t head_at;
    bool quiet; /* interrupts are off */
    int kick_fd;
    int call_fd;
    struct chain_note *note;
    struct av_vdriver_stats stats;
};

int av_split_add(struct av_vdriver *d, const struct av_vdriver_segment *segments,
                 uint32_t readable, uint32_t writable, uint32_t token);
bool av_split_publish(struct av_vdriver *d); /* whether the device wants a kick */
int av_split_take(struct av_vdriver *d, uint32_t *token, uint32_t *written_bytes);
void av_split_interrupts(struct av_vdriver *d, bool on);
bool av_split_more(const struct av_vdriver *d);

int av_packed_add(struct av_vdriver *d, const struct av_vdriver_segment *segments,
                  uint32_t readable, uint32_t writable, uint32_t token);
bool av_packed_publish(struct av_vdriver *d);
int av_packed_take(struct av_vdriver *d, uint32_t *token, uint32_t *written_bytes);
void av_packed_interrupts(struct av_vdriver *d, bool on);
bool av_packed_more(const struct av_vdriver *d);

#endif
