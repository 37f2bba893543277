#include "hold.h"

#define ENOUGH_MAX 16u
#define WAIT_MIN_NS 20000u /* less is less than a timer's wake-up */
#define WAIT_MAX_NS 400000u
#define AIM_A_WAIT 4u /* requests in one wait */
#define SKIP_FIRST 8u
#define IN_VAIN_MAX 9u
#define MANY 4u /* at once: this driver does not make one request at a time, or no longer */

void av_hold_init(struct av_hold *hold)
{
    *hold = (struct av_hold){ .wait_ns = WAIT_MIN_NS, .enough = ENOUGH_MAX };
}

static uint64_t bounded(uint64_t wait_ns)
{
    if (wait_ns < WAIT_MIN_NS)
        return WAIT_MIN_NS;
    return wait_ns < WAIT_MAX_NS ? wait_ns : WAIT_MAX_NS;
}

static uint64_t look_again(struct av_hold *hold, uint64_t now_ns)
{
    hold->fresh = 0;
    hold->until_ns = now_ns + hold->wait_ns;
    return hold->until_ns;
}

/* Make the next wait long enough for AIM_A_WAIT requests, at the rate of this one. */
static void adapt(struct av_hold *hold)
{
    uint64_t ideal_ns = AIM_A_WAIT * hold->wait_ns / hold->fresh;

    hold->wait_ns = bounded((3 * hold->wait_ns + ideal_ns) / 4);
}

/* No more came for a whole wait. */
static void run_out(struct av_hold *hold)
{
    uint32_t half = hold->count / 2;

    if (half >= 2) {
        hold->in_vain = 0;
        hold->enough = half < ENOUGH_MAX ? half : ENOUGH_MAX;
        return;
    }
    /* One at a time, or slower than we looked. */
    hold->enough = ENOUGH_MAX;
    hold->wait_ns = bounded(2 * hold->wait_ns);
    hold->skip = SKIP_FIRST << hold->in_vain;
    if (hold->in_vain < IN_VAIN_MAX)
        hold->in_vain++;
}

static uint64_t begin(struct av_hold *hold, uint32_t fresh, uint64_t now_ns)
{
    if (fresh >= MANY)
        hold->skip = hold->in_vain = 0;
    if (hold->skip != 0) {
        hold->skip--;
        return 0;
    }
    if (fresh == 0 || fresh >= hold->enough)
        return 0;
    hold->count = fresh;
    return look_again(hold, now_ns);
}

uint64_t av_hold_until(struct av_hold *hold, uint32_t fresh, int due, uint64_t now_ns)
{
    if (due && hold->count == 0)
        return begin(hold, fresh, now_ns);
    if (due && hold->count + fresh < hold->enough) {
        hold->count += fresh;
        hold->fresh += fresh;
        if (now_ns < hold->until_ns)
            return hold->until_ns;
        if (hold->fresh != 0) {
            adapt(hold);
            return look_again(hold, now_ns);
        }
        run_out(hold);
    }
    hold->count = 0;
    return 0;
}
