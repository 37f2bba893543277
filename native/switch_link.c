/* What a link does to frames: it loses them, limits their rate, delays them. */
#include "switch_internal.h"

#include <string.h>

#define NS_PER_S 1000000000u

/* splitmix64: a link's own, so that what others carry does not change what it loses. */
uint64_t av_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* When a frame of `bytes` that enters the link now arrives. */
static uint64_t arrival_ns(struct av_link *link, const struct av_switch_link *settings,
                           uint32_t bytes, uint64_t now_ns)
{
    uint64_t at_ns = now_ns;

    if (settings->bytes_per_s != 0) {
        if (link->free_ns > at_ns)
            at_ns = link->free_ns;
        at_ns += (uint64_t)bytes * NS_PER_S / settings->bytes_per_s;
        link->free_ns = at_ns;
    }
    at_ns += settings->delay_ns;
    if (settings->jitter_ns != 0)
        at_ns += av_random(&link->random) % (settings->jitter_ns + 1);
    if (at_ns < link->last_ns)
        at_ns = link->last_ns;
    link->last_ns = at_ns;
    return at_ns;
}

static bool delays(const struct av_switch_link *settings)
{
    return settings->delay_ns != 0 || settings->jitter_ns != 0 || settings->bytes_per_s != 0;
}

static void carry(struct av_switch *sw, uint32_t port, struct av_link *link,
                  const struct av_transit *transit, uint64_t now_ns, av_arrive *arrive)
{
    struct av_port *of = sw->port[port];
    struct av_frame *frame;

    if (of->settings.loss != 0 && av_random(&link->random) >> 32 < of->settings.loss) {
        of->stats.lost++;
        return;
    }
    if (!delays(&of->settings) && link->under_way.count == 0) {
        arrive(sw, port, transit, now_ns);
        return;
    }
    frame = av_frames_reserve(&link->under_way, transit->bytes);
    if (frame == NULL) {
        of->stats.dropped++;
        return;
    }
    frame->at_ns = arrival_ns(link, &of->settings, transit->bytes, now_ns);
    frame->bytes = transit->bytes;
    memcpy(frame->header, transit->header, AV_VNET_BYTES);
    memcpy(frame->data, transit->data, transit->bytes);
    av_frames_commit(&link->under_way, frame);
}

void av_link_send(struct av_switch *sw, uint32_t port, struct av_link *link,
                  const struct av_transit *frame, uint64_t now_ns, av_arrive *arrive)
{
    static const uint8_t complete[AV_VNET_BYTES];
    struct av_offload offload;

    /* On a wire each segment has its own fate. */
    if (sw->port[port]->settings.loss == 0 ||
        !av_offload_parse(frame->header, frame->data, frame->bytes, &offload) ||
        offload.segments == 1) {
        carry(sw, port, link, frame, now_ns, arrive);
        return;
    }
    for (uint32_t index = 0; index < offload.segments; index++) {
        struct av_transit segment = { .header = complete, .data = sw->scratch };

        segment.bytes = av_offload_segment(&offload, frame->data, frame->bytes, index,
                                           sw->scratch);
        carry(sw, port, link, &segment, now_ns, arrive);
    }
}

uint64_t av_link_advance(struct av_switch *sw, uint32_t port, struct av_link *link,
                         uint64_t now_ns, uint32_t *budget, av_arrive *arrive)
{
    const struct av_frame *frame;

    while ((frame = av_frames_front(&link->under_way)) != NULL) {
        struct av_transit transit = { frame->header, frame->data, frame->bytes };

        if (frame->at_ns > now_ns || *budget == 0)
            return frame->at_ns;
        --*budget;
        arrive(sw, port, &transit, frame->at_ns);
        av_frames_pop(&link->under_way);
    }
    return 0;
}

bool av_link_has_room(struct av_link *link)
{
    return link->under_way.base == NULL ||
           av_frames_reserve(&link->under_way, AV_FRAME_MAX_BYTES) != NULL;
}
