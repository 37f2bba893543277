/* The bounded queue of frames, against a plain one. */
#include <string.h>

#include "frames.h"
#include "fuzz.h"

#define QUEUE_BYTES 512u
#define FRAMES_MAX 64u

struct model {
    struct av_frames frames;
    uint32_t bytes[FRAMES_MAX];
    uint8_t fill[FRAMES_MAX];
    uint32_t count;
    uint8_t next_fill;
};

static void check_front(const struct model *model)
{
    const struct av_frame *front = av_frames_front(&model->frames);

    CHECK(model->frames.count == model->count && (front == NULL) == (model->count == 0));
    if (front == NULL) {
        CHECK(model->frames.used_bytes == 0);
        return;
    }
    CHECK(front->bytes == model->bytes[0]);
    CHECK((const uint8_t *)front >= model->frames.base);
    CHECK(front->data + front->bytes <= model->frames.base + QUEUE_BYTES);
    for (uint32_t i = 0; i < front->bytes; i++)
        CHECK(front->data[i] == model->fill[0]);
}

static void put(struct model *model, struct fuzz_input *in)
{
    uint32_t reserved = fuzz_u16(in) % (QUEUE_BYTES + 64), less = fuzz_below(in, 4) * 8;
    struct av_frame *frame;

    if (model->count == FRAMES_MAX)
        return;
    frame = av_frames_reserve(&model->frames, reserved);
    if (frame == NULL) {
        /* An empty queue takes whatever is not too large for it. */
        CHECK(model->count != 0 || reserved + sizeof(*frame) + 8 > QUEUE_BYTES);
        return;
    }
    CHECK(frame->data + reserved <= model->frames.base + QUEUE_BYTES);
    memset(frame->data, model->next_fill, reserved);
    frame->bytes = less > reserved ? 0 : reserved - less;
    model->bytes[model->count] = frame->bytes;
    model->fill[model->count++] = model->next_fill++;
    av_frames_commit(&model->frames, frame);
}

static void pop(struct model *model)
{
    if (model->count == 0)
        return;
    av_frames_pop(&model->frames);
    model->count--;
    memmove(model->bytes, model->bytes + 1, model->count * sizeof(model->bytes[0]));
    memmove(model->fill, model->fill + 1, model->count);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input in = { data, size };
    struct model model = { 0 };

    CHECK(av_frames_init(&model.frames, QUEUE_BYTES) == 0);
    while (fuzz_more(&in)) {
        uint32_t op = fuzz_below(&in, 16);

        if (op < 8) {
            put(&model, &in);
        } else if (op < 15) {
            pop(&model);
        } else {
            av_frames_clear(&model.frames);
            model.count = 0;
        }
        check_front(&model);
    }
    av_frames_fini(&model.frames);
    return 0;
}
