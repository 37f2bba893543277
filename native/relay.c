#include "relay.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>

#include "lane.h"

#define USED_BUFFER 1u

struct av_relay {
    struct av_lane lane; /* first: its home gives it back */
    struct av_interrupt *interrupt;
};

static int relay_run(struct av_lane *lane, uint32_t ready)
{
    if (ready != 0)
        av_interrupt_raise(((struct av_relay *)lane)->interrupt, USED_BUFFER);
    return 0;
}

static bool relay_arm(struct av_lane *lane)
{
    (void)lane;
    return false; /* the source is edge-triggered: nothing can come unseen */
}

static bool relay_pending(struct av_lane *lane)
{
    (void)lane;
    return false;
}

static bool relay_idle(const struct av_lane *lane)
{
    (void)lane;
    return true;
}

static const struct av_lane_ops lane_ops = {
    .run = relay_run,
    .arm = relay_arm,
    .pending = relay_pending,
    .idle = relay_idle,
};

struct av_relay *av_relay_create(struct av_home *home, int fd, struct av_interrupt *interrupt,
                                 int *error)
{
    struct av_relay *relay = calloc(1, sizeof(*relay));

    *error = ENOMEM;
    if (relay == NULL)
        return NULL;
    relay->interrupt = interrupt;
    *error = -av_lane_init(&relay->lane, home, &lane_ops, 0);
    if (*error != 0) {
        free(relay);
        return NULL;
    }
    av_lane_add_source(&relay->lane, fd, EPOLLIN);
    return relay;
}

void av_relay_destroy(struct av_relay *relay)
{
    av_lane_fini(&relay->lane);
    free(relay);
}

struct av_lane *av_relay_lane(struct av_relay *relay)
{
    return &relay->lane;
}
