#include "switch_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/timerfd.h>
#include <unistd.h>

#define PORTS_FIRST 8u
#define BUDGET_A_PORT 256u /* frames in one turn */
#define FRAMES_IN_A_CABLE_MAX 65536u /* for who sends while we look, a bound */
#define NS_PER_S 1000000000u

static int watch(const struct av_switch *sw, int fd)
{
    /* By its edges: nobody has to drain it. */
    struct epoll_event event = { .events = EPOLLIN | EPOLLET };

    return epoll_ctl(sw->epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0 ? -errno : 0;
}

static int set_up(struct av_switch *sw, const struct av_switch_setup *setup)
{
    void *scratch = mmap(NULL, AV_FRAME_MAX_BYTES, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint64_t secret = 0;
    int result;

    if (scratch == MAP_FAILED)
        return -errno;
    sw->scratch = scratch;
    sw->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    sw->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    sw->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    if (sw->epoll_fd < 0 || sw->event_fd < 0 || sw->timer_fd < 0)
        return -errno;
    result = watch(sw, sw->event_fd);
    if (result == 0)
        result = watch(sw, sw->timer_fd);
    if (result == 0 && getrandom(&secret, sizeof(secret), 0) < 0)
        result = -errno;
    return result < 0 ? result : av_table_init(&sw->table, setup, secret);
}

struct av_switch *av_switch_create(const struct av_switch_setup *setup, int *error)
{
    struct av_switch *sw = calloc(1, sizeof(*sw));
    int result;

    if (sw == NULL) {
        *error = ENOMEM;
        return NULL;
    }
    sw->epoll_fd = sw->event_fd = sw->timer_fd = sw->capture.fd = -1;
    sw->seed = setup->seed;
    result = set_up(sw, setup);
    if (result < 0) {
        *error = -result;
        av_switch_destroy(sw);
        return NULL;
    }
    return sw;
}

void av_switch_destroy(struct av_switch *sw)
{
    const int fds[] = { sw->epoll_fd, sw->event_fd, sw->timer_fd };

    av_capture_stop(sw);
    for (uint32_t port = 0; port < sw->ports_end; port++)
        av_switch_detach(sw, port);
    for (uint32_t i = 0; i < 3; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    if (sw->scratch != NULL)
        munmap(sw->scratch, AV_FRAME_MAX_BYTES);
    free(sw->table.address);
    free(sw->port);
    free(sw);
}

int av_switch_fd(const struct av_switch *sw)
{
    return sw->epoll_fd;
}

int av_switch_event_fd(const struct av_switch *sw)
{
    return sw->event_fd;
}

static int free_number(struct av_switch *sw)
{
    uint32_t number = 0;

    while (number < sw->ports_end && sw->port[number] != NULL)
        number++;
    if (number == sw->port_room) {
        uint32_t room = sw->port_room == 0 ? PORTS_FIRST : 2 * sw->port_room;
        struct av_port **grown = realloc(sw->port, room * sizeof(*grown));

        if (grown == NULL)
            return -ENOMEM;
        sw->port = grown;
        sw->port_room = room;
    }
    return (int)number;
}

int av_switch_attach(struct av_switch *sw, struct av_cable_end *end, uint32_t queue_bytes)
{
    int number = free_number(sw);
    struct av_port *port = number < 0 ? NULL : calloc(1, sizeof(*port));
    uint64_t random = sw->seed;

    if (port == NULL)
        return -ENOMEM;
    port->end = end;
    port->queue_bytes = queue_bytes;
    random += (uint64_t)number << 32;
    port->in.random = av_random(&random);
    port->out.random = av_random(&random);
    sw->port[number] = port;
    if ((uint32_t)number == sw->ports_end)
        sw->ports_end++;
    return number;
}

void av_switch_detach(struct av_switch *sw, uint32_t port)
{
    if (sw->port[port] == NULL)
        return;
    av_table_forget_port(sw, port);
    av_frames_fini(&sw->port[port]->in.under_way);
    av_frames_fini(&sw->port[port]->out.under_way);
    free(sw->port[port]);
    sw->port[port] = NULL;
    while (sw->ports_end != 0 && sw->port[sw->ports_end - 1] == NULL)
        sw->ports_end--;
}

int av_switch_set_link(struct av_switch *sw, uint32_t port, const struct av_switch_link *link)
{
    struct av_port *of = sw->port[port];
    struct av_frames *queues[] = { &of->in.under_way, &of->out.under_way };

    if (link->delay_ns != 0 || link->jitter_ns != 0 || link->bytes_per_s != 0)
        for (uint32_t i = 0; i < 2; i++)
            if (queues[i]->base == NULL && av_frames_init(queues[i], of->queue_bytes) < 0)
                return -ENOMEM;
    of->settings = *link;
    return 0;
}

void av_switch_cut(struct av_switch *sw, uint32_t port)
{
    struct av_link *links[] = { &sw->port[port]->in, &sw->port[port]->out };

    for (uint32_t i = 0; i < 2; i++) {
        if (links[i]->under_way.base != NULL)
            av_frames_clear(&links[i]->under_way);
        links[i]->free_ns = links[i]->last_ns = 0;
    }
    for (uint32_t left = FRAMES_IN_A_CABLE_MAX; left != 0; left--) {
        if (av_cable_front(sw->port[port]->end) == NULL)
            break;
        av_cable_pop(sw->port[port]->end);
    }
    av_cable_wake(sw->port[port]->end);
    av_table_forget_port(sw, port);
}

static void leave(struct av_switch *sw, uint32_t port, const struct av_transit *frame,
                  uint64_t at_ns)
{
    struct av_port *to = sw->port[port];

    (void)at_ns;
    switch (av_cable_forward(to->end, frame->header, frame->data, frame->bytes)) {
    case -EAGAIN:
        to->stats.dropped++;
        break;
    case 0:
        to->stats.out_frames++;
        to->stats.out_bytes += frame->bytes;
        break;
    default:
        to->stats.down++;
    }
}

/* A frame that is in the switch now goes to whom it is for. */
static void enter(struct av_switch *sw, uint32_t port, const struct av_transit *frame,
                  uint64_t at_ns)
{
    struct av_port *from = sw->port[port];
    uint32_t to = AV_SWITCH_NOBODY;

    if (frame->data[6] & 1) {
        from->stats.refused++;
        return;
    }
    from->stats.in_frames++;
    from->stats.in_bytes += frame->bytes;
    sw->stats.frames++;
    av_table_learn(sw, port, frame->data + 6, at_ns);
    if (sw->capture.fd >= 0)
        av_capture_frame(sw, frame, at_ns);
    if (!(frame->data[0] & 1))
        to = av_table_find(&sw->table, frame->data, at_ns);
    if (to == port) {
        sw->stats.same_port++;
    } else if (to != AV_SWITCH_NOBODY) {
        av_link_send(sw, to, &sw->port[to]->out, frame, at_ns, leave);
    } else {
        sw->stats.flooded++;
        for (to = 0; to < sw->ports_end; to++)
            if (to != port && sw->port[to] != NULL)
                av_link_send(sw, to, &sw->port[to]->out, frame, at_ns, leave);
    }
}

/* Take what waits at a port's cable. While its link is full it stays there, and its sender waits,
 * as for a slow wire. True when the budget is used up. */
static bool take(struct av_switch *sw, uint32_t port, uint64_t now_ns, uint32_t budget)
{
    struct av_port *from = sw->port[port];
    const struct av_frame *frame;

    while (budget != 0) {
        struct av_transit transit;

        if (!av_link_has_room(&from->in))
            return false; /* its timer goes on */
        frame = av_cable_front(from->end);
        if (frame == NULL)
            return false;
        transit = (struct av_transit){ frame->header, frame->data, frame->bytes };
        av_link_send(sw, port, &from->in, &transit, now_ns, enter);
        av_cable_pop(from->end);
        budget--;
    }
    return true;
}

static void earlier(uint64_t *next_ns, uint64_t at_ns)
{
    if (at_ns != 0 && (*next_ns == 0 || at_ns < *next_ns))
        *next_ns = at_ns;
}

static void arm(struct av_switch *sw, uint64_t next_ns, uint64_t now_ns)
{
    struct itimerspec at = { 0 };
    uint64_t left_ns;

    if (next_ns == 0 || next_ns <= now_ns || next_ns == sw->armed_ns)
        return;
    left_ns = next_ns - now_ns;
    at.it_value.tv_sec = (time_t)(left_ns / NS_PER_S);
    at.it_value.tv_nsec = (long)(left_ns % NS_PER_S);
    timerfd_settime(sw->timer_fd, 0, &at, NULL); /* cannot fail with these arguments */
    sw->armed_ns = next_ns;
}

int av_switch_turn(struct av_switch *sw, uint64_t now_ns, uint64_t wall_ns, uint64_t *next_ns)
{
    struct epoll_event events[2];
    bool more = false;

    /* Looked at, they are quiet until their next edge. */
    (void)epoll_wait(sw->epoll_fd, events, 2, 0);
    if (sw->armed_ns <= now_ns)
        sw->armed_ns = 0;
    sw->wall_less_now_ns = (int64_t)(wall_ns - now_ns);
    *next_ns = 0;
    for (uint32_t port = 0; port < sw->ports_end; port++) {
        uint32_t budget = BUDGET_A_PORT;

        if (sw->port[port] == NULL)
            continue;
        av_link_advance(sw, port, &sw->port[port]->in, now_ns, &budget, enter);
        more |= take(sw, port, now_ns, budget);
    }
    for (uint32_t port = 0; port < sw->ports_end; port++) {
        uint32_t budget = BUDGET_A_PORT;
        struct av_frame *first;

        if (sw->port[port] == NULL)
            continue;
        earlier(next_ns, av_link_advance(sw, port, &sw->port[port]->out, now_ns, &budget, leave));
        first = av_frames_front(&sw->port[port]->in.under_way);
        if (first != NULL)
            earlier(next_ns, first->at_ns);
    }
    if (sw->capture.fd >= 0)
        av_capture_flush(sw);
    arm(sw, *next_ns, now_ns);
    return more || (*next_ns != 0 && *next_ns <= now_ns);
}

int av_switch_statistics(struct av_switch *sw, struct av_switch_stats *out)
{
    *out = sw->stats;
    return -sw->capture.error;
}

void av_switch_port_statistics(struct av_switch *sw, uint32_t port,
                               struct av_switch_port_stats *out)
{
    const struct av_port *of = sw->port[port];

    *out = of->stats;
    out->in_flight_frames = of->in.under_way.count + of->out.under_way.count;
}

int av_switch_find(struct av_switch *sw, const uint8_t *mac, uint64_t now_ns)
{
    return (int)av_table_find(&sw->table, mac, now_ns);
}
