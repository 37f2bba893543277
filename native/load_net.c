/* Small frames through a network device (virtio 1.3 section 5.1.6), and through a bare TAP. */
#define _GNU_SOURCE /* sendmmsg */

#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "load_internal.h"

#define HEADER_BYTES 12u
#define BATCH 64u
#define RX_STRIDE_BYTES 2048u
#define FRAME_MIN_BYTES 14u
#define FRAME_MAX_BYTES 1514u
/* A frame that did not come by then is lost. */
#define LOST_NS 10000000u

/* An Ethernet header between two addresses nobody has, of a type for experiments. */
static const uint8_t ethernet[FRAME_MIN_BYTES] = { 0x02, 0, 0, 0, 0, 0x01, 0x02, 0,
                                                   0,    0, 0, 2, 0x88, 0xb5 };

static void fill_frame(uint8_t *to, uint32_t frame_bytes)
{
    memset(to, 0, frame_bytes);
    memcpy(to, ethernet, sizeof(ethernet));
}

static uint64_t tx_stride(const struct av_load_net *net)
{
    return ((uint64_t)HEADER_BYTES + net->frame_bytes + 63) & ~63ull;
}

uint64_t av_load_net_room(const struct av_load *load, const struct av_load_net *net)
{
    uint64_t stride = net->socket_fd >= 0 ? RX_STRIDE_BYTES : tx_stride(net);

    return (load->depth * stride + 4095) & ~4095ull;
}

/* The clock, looked at once in BATCH turns. */
struct timer {
    uint64_t deadline_ns;
    uint64_t now_ns;
    uint32_t turns;
};

static bool over(struct timer *timer)
{
    if (timer->turns++ % BATCH == 0)
        timer->now_ns = av_load_now_ns();
    return timer->now_ns >= timer->deadline_ns;
}

static struct timer timer_of(const struct av_load *load)
{
    return (struct timer){ .deadline_ns = av_load_now_ns() + load->duration_ns };
}

/* Frames for the host, as fast as the device takes them. */
static int transmit(struct av_load_thread *thread)
{
    const struct av_load *load = thread->load;
    const struct av_load_net *net = thread->kind;
    uint32_t slot, written, in_flight = 0, length = HEADER_BYTES + net->frame_bytes;
    uint8_t *data = av_gmem_hva(thread->mem, load->data_gpa, av_load_net_room(load, net));
    struct timer timer;
    int taken = 0;

    if (data == NULL)
        return -EFAULT;
    memset(data, 0, av_load_net_room(load, net));
    av_vdriver_interrupts_off(thread->driver);
    timer = timer_of(load);
    for (slot = 0; slot < load->depth; slot++) {
        struct av_vdriver_segment all = { load->data_gpa + slot * tx_stride(net), length };
        fill_frame(data + slot * tx_stride(net) + HEADER_BYTES, net->frame_bytes);
        in_flight += (uint32_t)av_vdriver_add(thread->driver, &all, 1, 0, slot);
    }
    while (in_flight != 0) {
        bool more = !over(&timer);

        if (atomic_load_explicit(&thread->give_up, memory_order_relaxed))
            return -ETIMEDOUT;
        av_vdriver_publish(thread->driver);
        for (uint32_t i = 0; i < BATCH; i++) {
            taken = av_vdriver_take(thread->driver, &slot, &written);
            if (taken <= 0)
                break;
            thread->result.requests++;
            if (more) {
                struct av_vdriver_segment all = { load->data_gpa + slot * tx_stride(net), length };
                av_vdriver_add(thread->driver, &all, 1, 0, slot);
            } else {
                in_flight--;
            }
        }
        if (taken < 0)
            return taken;
        if (taken == 0)
            __builtin_ia32_pause();
    }
    return 0;
}

/* Puts frames into a TAP by a packet socket on its interface, never more than its queue holds. */
struct injector {
    int socket_fd;
    uint32_t window;
    uint64_t sent;
    uint64_t moved_ns; /* when frames last arrived */
    uint64_t arrived;
    struct mmsghdr message[BATCH];
    struct iovec iov;
    uint8_t frame[FRAME_MAX_BYTES];
};

static void injector_start(struct injector *injector, const struct av_load_net *net)
{
    memset(injector, 0, sizeof(*injector));
    injector->socket_fd = net->socket_fd;
    injector->window = net->window;
    fill_frame(injector->frame, net->frame_bytes);
    injector->iov = (struct iovec){ injector->frame, net->frame_bytes };
    for (uint32_t i = 0; i < BATCH; i++)
        injector->message[i].msg_hdr =
            (struct msghdr){ .msg_iov = &injector->iov, .msg_iovlen = 1 };
}

/* Send as many frames as the window has room for, given how many arrived; 0 or -errno. */
static int inject(struct injector *injector, uint64_t arrived, uint64_t now_ns)
{
    uint64_t waiting = injector->sent > arrived ? injector->sent - arrived : 0;
    uint64_t room = waiting < injector->window ? injector->window - waiting : 0;
    int sent;

    if (arrived != injector->arrived) {
        injector->arrived = arrived;
        injector->moved_ns = now_ns;
    } else if (now_ns - injector->moved_ns > LOST_NS) {
        injector->sent = arrived; /* what is still on its way will not come */
        injector->moved_ns = now_ns;
    }
    if (room < BATCH)
        return 0;
    sent = sendmmsg(injector->socket_fd, injector->message, BATCH, MSG_DONTWAIT);
    if (sent < 0)
        return errno == EAGAIN || errno == ENOBUFS || errno == EINTR ? 0 : -errno;
    injector->sent += (uint64_t)sent;
    return 0;
}

/* Frames from the host: this thread puts them into the TAP, and takes them from the device. */
static int receive(struct av_load_thread *thread)
{
    const struct av_load *load = thread->load;
    const struct av_load_net *net = thread->kind;
    uint8_t *data = av_gmem_hva(thread->mem, load->data_gpa, av_load_net_room(load, net));
    struct injector injector;
    struct timer timer;
    uint32_t slot, written;
    int taken = 0, error = 0;

    if (data == NULL)
        return -EFAULT;
    memset(data, 0, av_load_net_room(load, net));
    av_vdriver_interrupts_off(thread->driver);
    injector_start(&injector, net);
    for (slot = 0; slot < load->depth; slot++) {
        uint64_t gpa = load->data_gpa + slot * RX_STRIDE_BYTES;
        av_vdriver_add(thread->driver, &(struct av_vdriver_segment){ gpa, RX_STRIDE_BYTES }, 0, 1,
                       slot);
    }
    timer = timer_of(load);
    while (!over(&timer) && error == 0) {
        av_vdriver_publish(thread->driver);
        error = inject(&injector, thread->result.requests, timer.now_ns);
        for (uint32_t i = 0; i < BATCH; i++) {
            taken = av_vdriver_take(thread->driver, &slot, &written);
            if (taken <= 0)
                break;
            thread->result.requests++;
            uint64_t gpa = load->data_gpa + slot * RX_STRIDE_BYTES;
            av_vdriver_add(thread->driver, &(struct av_vdriver_segment){ gpa, RX_STRIDE_BYTES }, 0,
                           1, slot);
        }
        if (taken < 0)
            return taken;
    }
    return error;
}

int av_load_net_run(struct av_vdriver *driver, const struct av_gmem *mem,
                    const struct av_load *load, const struct av_load_net *net,
                    struct av_load_result *out)
{
    if (load->depth == 0 || net->frame_bytes < FRAME_MIN_BYTES ||
        net->frame_bytes > FRAME_MAX_BYTES || av_load_net_room(load, net) > load->data_bytes)
        return -EINVAL;
    return av_load_run_threads(&driver, mem, 1, load, net,
                               net->socket_fd >= 0 ? receive : transmit, out);
}

/* A thread that takes frames from a bare TAP. */
struct reader {
    int tap_fd;
    atomic_bool stop;
    _Atomic uint64_t arrived;
    int error;
};

static void *read_frames(void *argument)
{
    struct reader *reader = argument;
    uint8_t frame[HEADER_BYTES + FRAME_MAX_BYTES];

    while (!atomic_load_explicit(&reader->stop, memory_order_relaxed)) {
        if (read(reader->tap_fd, frame, sizeof(frame)) > 0) {
            atomic_fetch_add_explicit(&reader->arrived, 1, memory_order_relaxed);
        } else if (errno == EAGAIN) {
            __builtin_ia32_pause();
        } else if (errno != EINTR) {
            reader->error = -errno;
            break;
        }
    }
    return NULL;
}

static int tap_read(int tap_fd, const struct av_load *load, const struct av_load_net *net,
                    struct av_load_result *out)
{
    struct reader reader = { .tap_fd = tap_fd };
    struct injector injector;
    struct timer timer;
    pthread_t thread;
    int error = -pthread_create(&thread, NULL, read_frames, &reader);

    if (error != 0)
        return error;
    injector_start(&injector, net);
    timer = timer_of(load);
    while (!over(&timer) && error == 0)
        error = inject(&injector, atomic_load_explicit(&reader.arrived, memory_order_relaxed),
                       timer.now_ns);
    atomic_store(&reader.stop, true);
    pthread_join(thread, NULL);
    out->requests = atomic_load(&reader.arrived);
    return error != 0 ? error : reader.error;
}

static int tap_write(int tap_fd, const struct av_load *load, const struct av_load_net *net,
                     struct av_load_result *out)
{
    uint8_t frame[HEADER_BYTES + FRAME_MAX_BYTES] = { 0 };
    struct timer timer = timer_of(load);

    fill_frame(frame + HEADER_BYTES, net->frame_bytes);
    while (!over(&timer)) {
        if (write(tap_fd, frame, HEADER_BYTES + net->frame_bytes) > 0)
            out->requests++;
        else if (errno != EAGAIN && errno != EINTR)
            return -errno;
    }
    return 0;
}

int av_load_tap_run(int tap_fd, const struct av_load *load, const struct av_load_net *net,
                    struct av_load_result *out)
{
    uint64_t began_ns = av_load_now_ns();
    int error;

    memset(out, 0, sizeof(*out));
    if (net->frame_bytes < FRAME_MIN_BYTES || net->frame_bytes > FRAME_MAX_BYTES)
        return -EINVAL;
    error = net->socket_fd >= 0 ? tap_read(tap_fd, load, net, out)
                                : tap_write(tap_fd, load, net, out);
    out->elapsed_ns = av_load_now_ns() - began_ns;
    return error;
}
