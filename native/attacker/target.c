#include "target.h"

#define RX 0u
#define TX 1u

/* What is where in the arena: headers, statuses, data that goes out and data that comes in. */
#define HEADER(slot) (memory.arena + 64u * (slot))
#define STATUS(slot) (memory.arena + 0x800 + (slot))
#define OUT (memory.arena + 0x1000)
#define IN (memory.arena + 0x2000)
#define IN_BYTES 0x1000u

#define GOOD_SECTOR 7u
#define ATTACKED_SECTOR 3u

#define NET_HEADER_BYTES 12u
#define FRAME_BYTES 60u
#define STRAYS_MAX 100u

#define VSOCK_HEADER_BYTES 44u
#define GUEST_CID 3u
#define HOST_CID 2u
#define NOBODYS_PORT 99u
#define OP_REQUEST 1u
#define OP_RST 3u
#define TYPE_STREAM 1u

struct vsock_header {
    uint64_t src_cid, dst_cid;
    uint32_t src_port, dst_port, len;
    uint16_t type, op;
    uint32_t flags, buf_alloc, fwd_cnt;
} __attribute__((packed));

volatile struct memory memory ALIGNED(4096);

void target_find(struct target *target)
{
    *target = (struct target){
        .kind = option_is("kind", "net") ? NET : option_is("kind", "vsock") ? VSOCK : BLK,
        .packed = option_is("ring", "packed"),
        .write = option_is("write", "1"),
        .attacked = (unsigned)option_number("queue"),
    };
    target->queues = target->kind == BLK ? 1 : 2;
    target->features = F_VERSION_1 | F_INDIRECT_DESC | (target->packed ? F_RING_PACKED : 0);
    device_find(&target->device, option_is("transport", "pci"), (unsigned)option_number("slot"));
    fill(memory.before, GUARD, GUARD_BYTES);
    fill(memory.between, GUARD, GUARD_BYTES);
    fill(memory.after, GUARD, GUARD_BYTES);
}

void target_open(struct target *target)
{
    if (!device_begin(&target->device, target->features))
        print("features refused\n");
    for (unsigned i = 0; i < target->queues; i++) {
        ring_clear(&target->ring[i], &target->device, i, target->packed, &memory.ring[i]);
        ring_open(&target->ring[i]);
    }
    device_set_status(&target->device, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
}

struct ring *attacked_ring(struct target *target)
{
    return &target->ring[target->attacked];
}

/* --- blk ------------------------------------------------------------------------------- */

void blk_chain(struct piece *piece, uint32_t type, uint64_t sector, unsigned slot)
{
    volatile struct blk_header *header = (volatile struct blk_header *)HEADER(slot);
    bool read = type == BLK_T_IN;

    header->type = type;
    header->sector = sector;
    *STATUS(slot) = 0xff;
    piece[0] = (struct piece){ gpa_of(header), sizeof(*header), 0 };
    piece[1] = (struct piece){ gpa_of(read ? IN : OUT), SECTOR_BYTES, read ? WRITE : 0 };
    piece[2] = (struct piece){ gpa_of(STATUS(slot)), 1, WRITE };
}

uint8_t blk_status(unsigned slot)
{
    return *STATUS(slot);
}

static bool blk_request(struct target *target, uint32_t type)
{
    struct piece piece[PIECES_MAX];
    uint32_t len;

    blk_chain(piece, type, GOOD_SECTOR, 1);
    ring_offer(&target->ring[0], piece, 3);
    device_kick(&target->device, 0);
    return target_await(target, &len) && blk_status(1) == 0 &&
           len == (type == BLK_T_IN ? SECTOR_BYTES + 1 : 1);
}

static bool blk_works(struct target *target)
{
    static uint8_t round;

    fill(OUT, ++round, SECTOR_BYTES);
    fill(IN, 0, SECTOR_BYTES);
    return blk_request(target, BLK_T_OUT) && blk_request(target, BLK_T_IN) &&
           is_filled(IN, round, SECTOR_BYTES);
}

/* --- net and vsock --------------------------------------------------------------------- */

/* What the host answers on the receive queue; how much. */
static uint32_t fill_request(const struct target *target, volatile uint8_t *at)
{
    volatile struct vsock_header *header = (volatile struct vsock_header *)at;
    static uint8_t round;

    fill(at, 0, 128);
    round++;
    if (target->kind == NET) {
        fill(at + NET_HEADER_BYTES, 0xff, 6);
        fill(at + NET_HEADER_BYTES + 6, 0x02, 6);
        fill(at + NET_HEADER_BYTES + 12, 0x88, 2);
        fill(at + NET_HEADER_BYTES + 14, round, FRAME_BYTES - 14);
        return NET_HEADER_BYTES + FRAME_BYTES;
    }
    header->src_cid = GUEST_CID;
    header->dst_cid = HOST_CID;
    header->src_port = 1024u + round;
    header->dst_port = NOBODYS_PORT;
    header->type = TYPE_STREAM;
    header->op = OP_REQUEST;
    return VSOCK_HEADER_BYTES;
}

static void send_request(struct target *target)
{
    struct piece piece = { gpa_of(OUT), fill_request(target, OUT), 0 };

    ring_offer(&target->ring[TX], &piece, 1);
    device_kick(&target->device, TX);
}

static bool is_answer(const struct target *target, uint32_t len)
{
    const volatile struct vsock_header *header = (const volatile struct vsock_header *)IN;
    const volatile struct vsock_header *asked = (const volatile struct vsock_header *)OUT;

    if (target->kind == NET)
        return len == NET_HEADER_BYTES + FRAME_BYTES &&
               same(IN + NET_HEADER_BYTES, OUT + NET_HEADER_BYTES, FRAME_BYTES);
    return len == VSOCK_HEADER_BYTES && header->op == OP_RST &&
           header->dst_port == asked->src_port && header->dst_cid == GUEST_CID;
}

static void offer_room(struct target *target)
{
    struct piece piece = { gpa_of(IN), IN_BYTES, WRITE };

    ring_offer(&target->ring[RX], &piece, 1);
    device_kick(&target->device, RX);
}

static bool packets_work(struct target *target)
{
    unsigned strays = 0;
    bool came = false, went = false;
    uint32_t len;

    offer_room(target);
    send_request(target);
    while (!came || !went) {
        if (!went)
            went = ring_take(&target->ring[TX], &len);
        if (!came && ring_take(&target->ring[RX], &len)) {
            came = is_answer(target, len);
            /* The network may still answer frames from before a reset. */
            if (!came && ++strays <= STRAYS_MAX)
                offer_room(target);
        }
        if (strays > STRAYS_MAX || device_status(&target->device) & NEEDS_RESET)
            return false;
    }
    return true;
}

/* --- any ------------------------------------------------------------------------------- */

unsigned target_chain(const struct target *target, struct piece *piece, unsigned *data)
{
    if (target->kind == BLK) {
        blk_chain(piece, target->write ? BLK_T_OUT : BLK_T_IN, ATTACKED_SECTOR, 0);
        *data = 1;
        return 3;
    }
    *data = 0;
    if (target->attacked == RX)
        piece[0] = (struct piece){ gpa_of(IN), IN_BYTES, WRITE };
    else
        piece[0] = (struct piece){ gpa_of(OUT), fill_request(target, OUT), 0 };
    return 1;
}

void target_provoke(struct target *target)
{
    device_kick(&target->device, target->attacked);
    if (target->kind != BLK && target->attacked == RX)
        send_request(target);
}

bool target_await(struct target *target, uint32_t *len)
{
    for (;;) {
        if (ring_take(attacked_ring(target), len))
            return true;
        if (device_status(&target->device) & NEEDS_RESET)
            return false;
    }
}

void target_outcome(struct target *target, const char *name)
{
    uint32_t len;
    bool used = target_await(target, &len);

    print(name);
    if (!used) {
        print(": needs-reset\n");
        return;
    }
    print(": used ");
    print_number(len);
    if (target->kind == BLK) {
        print(" status ");
        print_number(blk_status(0));
    }
    print("\n");
}

bool target_works(struct target *target)
{
    return target->kind == BLK ? blk_works(target) : packets_work(target);
}

void target_check(struct target *target)
{
    target_open(target);
    say("device", target_works(target) && target_works(target) ? "works" : "BROKEN");
    say("guards", is_filled(memory.before, GUARD, GUARD_BYTES) &&
                          is_filled(memory.between, GUARD, GUARD_BYTES) &&
                          is_filled(memory.after, GUARD, GUARD_BYTES)
                      ? "whole"
                      : "BROKEN");
}
