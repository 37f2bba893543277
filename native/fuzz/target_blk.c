/* The block device (virtio 1.3 section 5.2.6): a hostile driver, and a disk that does operations
 * late, in part or not at all. */
#include <string.h>

#include "blk_internal.h"
#include "blk_loop.h"
#include "fuzz.h"
#include "host.h"

#define DEPTH 4u
#define HEADER_BYTES 16u
#define HEADERS 4u
#define DATA_BYTES 1536u /* two of them, next to one another */
#define COPY_MAX_BYTES 2048u /* two requests may be more */
#define SECTORS 64u

struct disk {
    struct fuzz_guest guest;
    struct fuzz_queue queue;
    struct av_blk *blk;
    struct av_blk_loop_op op[DEPTH]; /* taken and not finished */
    uint32_t ops;
    uint64_t headers_gpa;
    uint64_t sectors_max; /* the most it ever had */
    uint64_t lost;        /* chains forgotten in earlier lives of the ring */
    int lost_errno;       /* of a sync that failed */
};

static void create(struct disk *disk, struct fuzz_input *in)
{
    uint8_t bits = fuzz_u8(in);
    struct av_blk_config config = {
        .fd = -1,
        .capacity_sectors = SECTORS,
        .read_only = bits & 1,
        .discard = bits >> 1 & 1,
        .write_zeroes = bits >> 2 & 1,
        .writeback = bits >> 3 & 1,
        .alignment_bytes = bits & 16 ? 512 : 1,
        .copies = bits >> 4 & 1,
        .copy_max_bytes = COPY_MAX_BYTES,
        .lost = bits & 32 ? &disk->lost_errno : NULL,
        .seg_max = 1 + (bits >> 5),
        .depth = DEPTH,
        .engine = AV_BLK_LOOP,
        .id = "fuzz",
    };
    int error;

    fuzz_guest_init(&disk->guest);
    fuzz_queue_init(&disk->queue, &disk->guest, in, bits >> 7);
    disk->headers_gpa = fuzz_guest_add_data(&disk->guest, HEADERS * HEADER_BYTES);
    fuzz_guest_add_data(&disk->guest, DATA_BYTES);
    fuzz_guest_add_data(&disk->guest, DATA_BYTES);
    disk->sectors_max = SECTORS;
    disk->blk = av_blk_create(&config, fuzz_home(), disk->queue.ring, &error);
    CHECK(disk->blk != NULL);
    CHECK(av_lane_start(av_blk_lane(disk->blk)) == 0);
}

/* A request in the form that drivers give it, with anything in it. */
static void offer_request(struct disk *disk, struct fuzz_input *in)
{
    static const uint32_t types[] = { AV_BLK_T_IN,     AV_BLK_T_OUT,     AV_BLK_T_FLUSH,
                                      AV_BLK_T_GET_ID, AV_BLK_T_DISCARD, AV_BLK_T_WRITE_ZEROES };
    uint32_t kind = fuzz_below(in, 8), slot = fuzz_below(in, HEADERS), offset = fuzz_u16(in);
    uint32_t type = kind < 6 ? types[kind] : fuzz_u32(in);
    uint64_t sector = fuzz_number(in), gpa = disk->headers_gpa + slot * HEADER_BYTES;
    uint64_t data_gpa = disk->headers_gpa + HEADERS * HEADER_BYTES + offset % DATA_BYTES;
    uint8_t *header = av_gmem_hva(&disk->guest.mem, gpa, HEADER_BYTES);
    uint32_t bytes = fuzz_u8(in) * 16u;
    bool reads = type == AV_BLK_T_IN || type == AV_BLK_T_GET_ID;
    struct av_desc segment[3];

    memcpy(header, &type, sizeof(type));
    memcpy(header + 8, &sector, sizeof(sector));
    segment[0] = fuzz_segment(gpa, HEADER_BYTES, 0);
    segment[1] = fuzz_segment(data_gpa, bytes, reads ? AV_DESC_WRITE : 0);
    segment[2] = fuzz_segment(gpa, 1, AV_DESC_WRITE);
    if (bytes == 0)
        segment[1] = segment[2];
    fuzz_queue_offer(&disk->queue, segment, bytes == 0 ? 2 : 3);
}

/* What any operation has to keep to. */
static void check_op(const struct disk *disk, const struct av_blk_loop_op *op)
{
    const struct av_blk_config *config = &disk->blk->config;
    const struct iovec *iov = av_blk_loop_segments(op->op);
    uint64_t bytes = 0;

    if (op->kind == AV_BLK_OP_SYNC)
        return;
    CHECK(op->length != 0 && op->length % AV_BLK_SECTOR_BYTES == 0);
    CHECK(op->offset % AV_BLK_SECTOR_BYTES == 0);
    CHECK(op->offset / AV_BLK_SECTOR_BYTES + op->length / AV_BLK_SECTOR_BYTES <=
          disk->sectors_max);
    CHECK(op->kind == AV_BLK_OP_READ || !config->read_only);
    CHECK(op->kind != AV_BLK_OP_ZERO || config->write_zeroes);
    CHECK(op->kind != AV_BLK_OP_PUNCH || config->discard || config->write_zeroes);
    for (uint32_t i = 0; i < op->iov_count; i++) {
        CHECK((uintptr_t)iov[i].iov_base % config->alignment_bytes == 0);
        bytes += iov[i].iov_len;
    }
    if (op->kind == AV_BLK_OP_READ || op->kind == AV_BLK_OP_WRITE)
        CHECK(bytes == op->length);
}

static void take_ops(struct disk *disk)
{
    int count = av_blk_loop_take(disk->blk, &disk->op[disk->ops], (int)(DEPTH - disk->ops));

    for (int i = 0; i < count; i++)
        check_op(disk, &disk->op[disk->ops + (uint32_t)i]);
    disk->ops += (uint32_t)count;
    CHECK(disk->ops <= disk->blk->in_flight);
}

/* Do what an operation says, as far as `bytes`. */
static void move_data(const struct av_blk_loop_op *op, uint64_t bytes)
{
    static uint8_t sink[65536];
    const struct iovec *iov = av_blk_loop_segments(op->op);

    for (uint32_t i = 0; i < op->iov_count && bytes != 0; i++) {
        size_t piece = iov[i].iov_len < bytes ? iov[i].iov_len : bytes;

        CHECK(piece <= sizeof(sink));
        if (op->kind == AV_BLK_OP_READ)
            memset(iov[i].iov_base, 0x5a, piece);
        else
            memcpy(sink, iov[i].iov_base, piece);
        bytes -= piece;
    }
}

static void finish(struct disk *disk, uint32_t index, int64_t result)
{
    struct av_blk_loop_op op = disk->op[index];
    bool moves = op.kind == AV_BLK_OP_READ || op.kind == AV_BLK_OP_WRITE;

    if (result > 0 && moves)
        move_data(&op, (uint64_t)result);
    else if (result > 0)
        result = 0;
    disk->op[index] = disk->op[--disk->ops];
    av_blk_loop_finish(disk->blk, op.op, result);
}

static void finish_any(struct disk *disk, struct fuzz_input *in)
{
    uint32_t index = fuzz_below(in, disk->ops);
    /* A file's sectors come whole. */
    uint64_t sectors = disk->op[index].length / AV_BLK_SECTOR_BYTES;
    uint8_t how = fuzz_u8(in);

    switch (how & 7) {
    case 0:
        finish(disk, index, -EIO);
        break;
    case 1:
        finish(disk, index, -EOPNOTSUPP);
        break;
    case 2:
        finish(disk, index, 0);
        break;
    case 3:
        finish(disk, index,
               sectors == 0 ? 0 : (int64_t)((1 + (how >> 3) % sectors) * AV_BLK_SECTOR_BYTES));
        break;
    default:
        finish(disk, index, (int64_t)disk->op[index].length);
    }
}

/* Each chain that was taken is either under way or given back, but for one that broke the ring. */
static void check(const struct disk *disk)
{
    struct av_vring_stats stats;

    av_vring_statistics(disk->queue.ring, &stats);
    CHECK(disk->blk->in_flight <= DEPTH);
    CHECK(stats.chains - stats.used - disk->blk->in_flight - disk->lost ==
          (stats.fault == AV_FAULT_REQUEST));
}

static void turn(struct disk *disk)
{
    av_lane_lock(av_blk_lane(disk->blk));
    av_lane_wake(av_blk_lane(disk->blk)); /* a kick */
    av_lane_unlock(av_blk_lane(disk->blk));
    av_home_turn(fuzz_home());
    check(disk);
}

/* Bring it to rest: what is under way comes to its end, and it begins nothing new. */
static void quiesce(struct disk *disk)
{
    uint32_t left = 4 * DEPTH; /* a request that fails needs one operation more at most */

    while (av_lane_hold(av_blk_lane(disk->blk)) == 0) {
        CHECK(left-- != 0);
        take_ops(disk);
        while (disk->ops != 0)
            finish(disk, 0, -EIO);
        turn(disk);
        fuzz_now_ns += 1000000; /* holds end */
    }
    CHECK(disk->blk->in_flight == 0);
}

static void reset(struct disk *disk)
{
    struct av_vring_stats stats;

    quiesce(disk);
    av_vring_statistics(disk->queue.ring, &stats);
    disk->lost = stats.chains - stats.used;
    fuzz_queue_restart(&disk->queue);
    CHECK(av_lane_start(av_blk_lane(disk->blk)) == 0);
}

static void step(struct disk *disk, struct fuzz_input *in)
{
    uint32_t op = fuzz_below(in, 12);

    if (op < 3) {
        offer_request(disk, in);
    } else if (op < 5) {
        fuzz_queue_step(&disk->queue, in);
    } else if (op < 7) {
        turn(disk);
    } else if (op == 7) {
        take_ops(disk);
    } else if (op < 10 && disk->ops != 0) {
        finish_any(disk, in);
    } else if (op == 10) {
        uint8_t how = fuzz_u8(in);

        fuzz_now_ns += how * 10000u;
        av_blk_set_writeback(disk->blk, how & 1);
    } else if (op == 11 && fuzz_u8(in) & 1) {
        reset(disk);
    } else if (op == 11) {
        uint64_t sectors = fuzz_number(in) & 0xffff;

        av_blk_set_capacity(disk->blk, sectors);
        if (sectors > disk->sectors_max)
            disk->sectors_max = sectors;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input in = { data, size };
    struct disk disk = { 0 };

    fuzz_now_ns = 0;
    create(&disk, &in);
    while (fuzz_more(&in))
        step(&disk, &in);
    quiesce(&disk);
    av_blk_destroy(disk.blk);
    fuzz_queue_fini(&disk.queue);
    fuzz_guest_fini(&disk.guest);
    return 0;
}
