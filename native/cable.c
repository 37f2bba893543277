#include "cable.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "offload.h"

struct av_cable_end {
    struct av_cable *cable;
    struct av_cable_end *other;
    struct av_frames queue; /* for this end to take */
    int event_fd;
    bool up;
    bool patient;
    bool wants_frames; /* found none */
    bool wants_room;   /* found none at the other end */
    uint32_t offloads;
    uint8_t *scratch; /* of a frame that this end sends, while it is made into smaller ones */
    struct av_cable_stats stats;
};

struct av_cable {
    pthread_mutex_t lock;
    struct av_cable_end end[2];
};

static void lock(struct av_cable_end *end)
{
    pthread_mutex_lock(&end->cable->lock);
}

static void unlock(struct av_cable_end *end)
{
    pthread_mutex_unlock(&end->cable->lock);
}

static int set_up(struct av_cable *cable, uint32_t queue_bytes)
{
    for (uint32_t side = 0; side < 2; side++) {
        struct av_cable_end *end = &cable->end[side];
        void *scratch = mmap(NULL, AV_FRAME_MAX_BYTES, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        int result;

        end->cable = cable;
        end->other = &cable->end[!side];
        end->event_fd = -1;
        if (scratch == MAP_FAILED)
            return -errno;
        end->scratch = scratch;
        result = av_frames_init(&end->queue, queue_bytes);
        if (result < 0)
            return result;
    }
    return 0;
}

struct av_cable *av_cable_create(uint32_t queue_bytes, int *error)
{
    struct av_cable *cable = calloc(1, sizeof(*cable));
    int result;

    if (cable == NULL) {
        *error = ENOMEM;
        return NULL;
    }
    pthread_mutex_init(&cable->lock, NULL);
    result = set_up(cable, queue_bytes);
    if (result < 0) {
        *error = -result;
        av_cable_destroy(cable);
        return NULL;
    }
    return cable;
}

void av_cable_destroy(struct av_cable *cable)
{
    if (cable == NULL)
        return;
    for (uint32_t side = 0; side < 2; side++) {
        av_frames_fini(&cable->end[side].queue);
        if (cable->end[side].scratch != NULL)
            munmap(cable->end[side].scratch, AV_FRAME_MAX_BYTES);
    }
    pthread_mutex_destroy(&cable->lock);
    free(cable);
}

struct av_cable_end *av_cable_end(struct av_cable *cable, int side)
{
    return &cable->end[side & 1];
}

static void wake(const struct av_cable_end *end)
{
    uint64_t one = 1;
    ssize_t result = -1;

    if (end->event_fd >= 0)
        result = write(end->event_fd, &one, sizeof(one));
    (void)result; /* it can only be full, and then it is readable */
}

void av_cable_watch(struct av_cable_end *end, int event_fd)
{
    lock(end);
    end->event_fd = event_fd;
    wake(end);
    unlock(end);
}

void av_cable_wake(struct av_cable_end *end)
{
    lock(end);
    wake(end);
    unlock(end);
}

static void came(struct av_cable_end *to)
{
    if (to->wants_frames) {
        to->wants_frames = false;
        wake(to);
    }
}

static void go_on(struct av_cable_end *end)
{
    if (end->wants_room) {
        end->wants_room = false;
        wake(end);
    }
}

/* Somebody who waits is told at half: a frame at a time would be a wake-up a frame. */
static void made_room(struct av_cable_end *end)
{
    if (end->queue.used_bytes <= end->queue.size_bytes / 2)
        go_on(end->other);
}

void av_cable_set_up(struct av_cable_end *end, int up)
{
    lock(end);
    end->up = up != 0;
    if (!up)
        av_frames_clear(&end->queue);
    /* Who waits for room goes on: there is room, or what it sends is lost now. */
    go_on(end);
    go_on(end->other);
    unlock(end);
}

int av_cable_is_up(struct av_cable_end *end)
{
    int up;

    lock(end);
    up = end->up && end->other->up;
    unlock(end);
    return up;
}

void av_cable_set_offloads(struct av_cable_end *end, uint32_t offloads)
{
    lock(end);
    end->offloads = offloads;
    unlock(end);
}

void av_cable_set_patient(struct av_cable_end *end, int patient)
{
    lock(end);
    end->patient = patient != 0;
    unlock(end);
}

void av_cable_statistics(struct av_cable_end *end, struct av_cable_stats *out)
{
    lock(end);
    *out = end->stats;
    out->queued_frames = end->queue.count;
    out->queued_bytes = end->queue.used_bytes;
    unlock(end);
}

static void count_sent(struct av_cable_end *end, uint32_t bytes)
{
    end->stats.sent_frames++;
    end->stats.sent_bytes += bytes;
}

static struct av_frame *reserve(struct av_cable_end *end, uint32_t bytes)
{
    return av_frames_reserve(&end->other->queue, bytes);
}

static void commit(struct av_cable_end *end, struct av_frame *frame)
{
    av_frames_commit(&end->other->queue, frame);
    count_sent(end, frame->bytes);
    came(end->other);
}

/* Whether the segments of `offload` find room, now that `used` bytes of it are taken. */
static bool segments_fit(const struct av_cable_end *end, const struct av_offload *offload,
                         uint64_t used)
{
    uint64_t each = sizeof(struct av_frame) + 8u + offload->headers + offload->segment_bytes;

    return used + 2u * each + offload->segments * each <= end->other->queue.size_bytes;
}

/* Send what is in `data` in pieces that the other end takes. */
static void send_segments(struct av_cable_end *end, const struct av_offload *offload,
                          const uint8_t *data, uint32_t bytes)
{
    end->stats.segmented++;
    for (uint32_t index = 0; index < offload->segments; index++) {
        struct av_frame *frame = reserve(end, offload->headers + offload->segment_bytes);

        if (frame == NULL) {
            end->stats.lost_full += offload->segments - index;
            return;
        }
        memset(frame->header, 0, sizeof(frame->header));
        frame->bytes = av_offload_segment(offload, data, bytes, index, frame->data);
        commit(end, frame);
    }
}

/* Send a frame that lies reserved, its header with it; 0, -EAGAIN or -EINVAL. */
static int send_reserved(struct av_cable_end *end, struct av_frame *frame, bool may_wait)
{
    struct av_offload offload;

    if (!av_offload_parse(frame->header, frame->data, frame->bytes, &offload)) {
        end->stats.refused++;
        return -EINVAL;
    }
    if ((offload.needs & ~end->other->offloads) == 0) {
        av_offload_header(&offload, frame->header);
    } else if (offload.segments == 1) {
        av_offload_checksum(&offload, frame->data, frame->bytes);
        memset(frame->header, 0, sizeof(frame->header));
    } else {
        if (may_wait && !segments_fit(end, &offload, end->other->queue.used_bytes) &&
            segments_fit(end, &offload, 0))
            return -EAGAIN;
        memcpy(end->scratch, frame->data, frame->bytes);
        send_segments(end, &offload, end->scratch, frame->bytes);
        return 0;
    }
    commit(end, frame);
    return 0;
}

/* Whether a frame of `bytes` may go at all; 1, 0 it is lost, or -EINVAL. */
static int passes(struct av_cable_end *end, uint32_t bytes)
{
    if (bytes < AV_FRAME_MIN_BYTES || bytes > AV_FRAME_MAX_BYTES) {
        end->stats.refused++;
        return -EINVAL;
    }
    if (end->up && end->other->up)
        return 1;
    end->stats.lost_down++;
    return 0;
}

static int send_one(struct av_cable_end *end, const uint8_t *header, const uint8_t *data,
                    uint32_t bytes)
{
    struct av_frame *frame;
    int result = passes(end, bytes);

    if (result <= 0)
        return 0;
    frame = reserve(end, bytes);
    if (frame == NULL)
        return -EAGAIN;
    if (header != NULL)
        memcpy(frame->header, header, sizeof(frame->header));
    else
        memset(frame->header, 0, sizeof(frame->header));
    memcpy(frame->data, data, bytes);
    frame->bytes = bytes;
    return send_reserved(end, frame, true);
}

int av_cable_send(struct av_cable_end *end, const uint8_t *header, const uint8_t *data,
                  const uint32_t *lengths, uint32_t count)
{
    uint32_t sent = 0;

    lock(end);
    for (; sent < count; sent++) {
        if (send_one(end, header, data, lengths[sent]) == -EAGAIN) {
            end->wants_room = true;
            break;
        }
        data += lengths[sent];
    }
    unlock(end);
    return (int)sent;
}

static struct av_frame *front(struct av_cable_end *end)
{
    struct av_frame *frame = av_frames_front(&end->queue);

    if (frame == NULL)
        end->wants_frames = true;
    return frame;
}

static void pop(struct av_cable_end *end)
{
    end->stats.taken_frames++;
    end->stats.taken_bytes += av_frames_front(&end->queue)->bytes;
    av_frames_pop(&end->queue);
    made_room(end);
}

int av_cable_take(struct av_cable_end *end, uint8_t *to, uint32_t room_bytes, uint32_t *lengths,
                  uint32_t max)
{
    const struct av_frame *frame;
    uint32_t count = 0;

    lock(end);
    while (count < max && (frame = front(end)) != NULL && frame->bytes <= room_bytes) {
        memcpy(to, frame->data, frame->bytes);
        to += frame->bytes;
        room_bytes -= frame->bytes;
        lengths[count++] = frame->bytes;
        pop(end);
    }
    unlock(end);
    return (int)count;
}

/* Copy up to `bytes` to buffers, from `*offset` of them on. */
static void scatter(const struct iovec *iov, uint32_t count, uint32_t *offset, const uint8_t *from,
                    uint32_t bytes)
{
    uint32_t skip = *offset;

    *offset += bytes;
    for (uint32_t i = 0; i < count && bytes != 0; i++) {
        size_t length = iov[i].iov_len, piece;

        if (skip >= length) {
            skip -= (uint32_t)length;
            continue;
        }
        piece = length - skip < bytes ? length - skip : bytes;
        memcpy((uint8_t *)iov[i].iov_base + skip, from, piece);
        from += piece;
        bytes -= (uint32_t)piece;
        skip = 0;
    }
}

ssize_t av_cable_readv(struct av_cable_end *end, const struct iovec *iov, uint32_t count)
{
    const struct av_frame *frame;
    uint32_t offset = 0;
    uint64_t room = 0;

    for (uint32_t i = 0; i < count; i++)
        room += iov[i].iov_len;
    lock(end);
    frame = front(end);
    if (frame == NULL) {
        unlock(end);
        errno = EAGAIN;
        return -1;
    }
    scatter(iov, count, &offset, frame->header, AV_VNET_BYTES);
    scatter(iov, count, &offset, frame->data, frame->bytes);
    pop(end);
    unlock(end);
    return offset < room ? (ssize_t)offset : (ssize_t)room; /* what does not fit is cut off */
}

/* Copy a packet once, into the place from which it will go. */
static void gather(const struct iovec *iov, uint32_t count, struct av_frame *frame)
{
    uint8_t *to = frame->header;
    uint32_t room = AV_VNET_BYTES;
    bool in_header = true;

    for (uint32_t i = 0; i < count; i++) {
        const uint8_t *from = iov[i].iov_base;
        size_t left = iov[i].iov_len;

        if (in_header && left >= room) {
            memcpy(to, from, room);
            from += room;
            left -= room;
            to = frame->data;
            in_header = false;
        }
        memcpy(to, from, left);
        to += left;
        if (in_header)
            room -= (uint32_t)left;
    }
}

/* As send_one(), from buffers of a guest. */
static int send_packet(struct av_cable_end *end, const struct iovec *iov, uint32_t count,
                       uint32_t bytes)
{
    struct av_frame *frame;
    int result = passes(end, bytes);

    if (result <= 0)
        return result;
    frame = reserve(end, bytes);
    if (frame == NULL)
        return -EAGAIN;
    frame->bytes = bytes;
    gather(iov, count, frame);
    return send_reserved(end, frame, end->other->patient);
}

ssize_t av_cable_writev(struct av_cable_end *end, const struct iovec *iov, uint32_t count)
{
    uint64_t total = 0;
    uint32_t bytes;
    int result;

    for (uint32_t i = 0; i < count; i++)
        total += iov[i].iov_len;
    bytes = total < AV_VNET_BYTES             ? 0
            : total - AV_VNET_BYTES > UINT32_MAX ? UINT32_MAX
                                                 : (uint32_t)(total - AV_VNET_BYTES);
    lock(end);
    result = send_packet(end, iov, count, bytes);
    if (result == -EAGAIN && end->other->patient) {
        end->wants_room = true;
    } else if (result == -EAGAIN) {
        end->stats.lost_full++;
        result = 0;
    }
    unlock(end);
    if (result == 0)
        return (ssize_t)total;
    errno = -result;
    return -1;
}

int av_cable_has_room(struct av_cable_end *end)
{
    int has_room;

    lock(end);
    has_room = !end->wants_room;
    unlock(end);
    return has_room;
}

struct av_frame *av_cable_front(struct av_cable_end *end)
{
    struct av_frame *frame;

    lock(end);
    frame = front(end);
    unlock(end);
    return frame;
}

void av_cable_pop(struct av_cable_end *end)
{
    lock(end);
    pop(end);
    unlock(end);
}

int av_cable_forward(struct av_cable_end *end, const uint8_t *header, const uint8_t *data,
                     uint32_t bytes)
{
    int result = 0;

    lock(end);
    if (!end->up || !end->other->up)
        result = -ENOTCONN;
    else if (send_one(end, header, data, bytes) == -EAGAIN)
        result = -EAGAIN;
    if (result == -EAGAIN)
        end->stats.lost_full++;
    if (result == -ENOTCONN)
        end->stats.lost_down++;
    unlock(end);
    return result;
}
