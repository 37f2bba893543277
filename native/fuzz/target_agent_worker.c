/* What a worker of the guest's agent reads: frames, one after the other, on a connection that ends
 * anywhere, and the paths in a request. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <setjmp.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fuzz.h"
#include "host.h"

#include "agent/worker.c" /* for parse() */

static jmp_buf process_ends;

void fuzz__exit(int status)
{
    (void)status;
    longjmp(process_ends, 1);
}

int fuzz_kill(pid_t pid, int number)
{
    (void)pid;
    (void)number;
    abort(); /* a worker signals nobody */
}

/* A string of the request that ends within it. */
static void check_string(const uint8_t *payload, size_t size, const char *string)
{
    const uint8_t *at = (const uint8_t *)string;

    CHECK(at >= payload + sizeof(struct av_file) && at < payload + size);
    CHECK(memchr(at, 0, size - (size_t)(at - payload)) != NULL);
}

static void paths(struct fuzz_input *in)
{
    size_t size = fuzz_u8(in);
    uint8_t *payload = malloc(size);
    bool two = fuzz_u8(in) & 1;
    struct av_file head;
    const char *other = NULL, *path;

    CHECK(payload != NULL || size == 0);
    fuzz_bytes(in, payload, size);
    path = parse(&head, payload, size, two, &other);
    if (path != NULL)
        check_string(payload, size, path);
    if (path != NULL && two)
        check_string(payload, size, other);
    free(payload);
}

/* What the client sends lies in the socket, and what the agent has read already in `early`. */
static void receive(struct fuzz_input *in, int client, int worker)
{
    struct av_buffer early = { 0 };
    uint8_t bytes[512];
    uint32_t count;

    early.end = fuzz_u8(in);
    early.bytes = malloc(early.end);
    CHECK(early.bytes != NULL || early.end == 0);
    fuzz_bytes(in, early.bytes, early.end);
    while (fuzz_more(in)) {
        count = 1 + fuzz_below(in, 255);
        fuzz_bytes(in, bytes, count);
        if (send(client, bytes, count, MSG_NOSIGNAL) < 0)
            break;
    }
    shutdown(client, SHUT_WR);
    if (setjmp(process_ends) != 0)
        return;
    av_wire_begin(worker, &early);
    free(early.bytes);
    for (;;) {
        unsigned char *payload;
        size_t size, sum = 0;

        av_wire_receive(&payload, &size);
        CHECK(size <= AV_FRAME_MAX);
        for (size_t i = 0; i < size; i++)
            sum += payload[i];
        if (sum == 1) /* a request that fails in an upload takes what still comes */
            av_wire_upload = AV_UPLOADING;
        if (sum == 2)
            av_wire_fail(5, "something");
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input in = { data, size };
    int ends[2];

    if (fuzz_u8(&in) & 1) {
        paths(&in);
        return 0;
    }
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    fcntl(ends[1], F_SETFL, O_NONBLOCK);
    av_wire_upload = AV_NO_UPLOAD;
    receive(&in, ends[1], ends[0]);
    close(ends[0]);
    close(ends[1]);
    return 0;
}
