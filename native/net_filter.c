/* Which frames the guest asked to receive. Drivers set this up as they would a NIC's filter; on a
 * TAP it matters where a bridge behind it floods. */
#include "net_internal.h"

#include <string.h>

#define TYPE_AT 12u
#define TYPE_VLAN 0x8100u

static bool vlan_wanted(const struct av_net_filter *filter, const uint8_t *frame)
{
    uint32_t type = (uint32_t)frame[TYPE_AT] << 8 | frame[TYPE_AT + 1];
    uint32_t vlan = ((uint32_t)frame[TYPE_AT + 2] << 8 | frame[TYPE_AT + 3]) & 0xfff;

    /* Number 0 is a priority and no network. */
    if (!filter->by_vlan || type != TYPE_VLAN || vlan == 0)
        return true;
    return filter->vlan[vlan / 64] >> vlan % 64 & 1;
}

static bool in_table(const struct av_net_filter *filter, const uint8_t *mac)
{
    for (uint32_t i = 0; i < filter->addresses; i++)
        if (memcmp(filter->address[i], mac, 6) == 0)
            return true;
    return false;
}

bool av_net_wanted(const struct av_net_filter *filter, const uint8_t *frame)
{
    static const uint8_t broadcast[6] = { 0xff, 0xff, 0xff, 0xff, 0xff, 0xff };

    if (!vlan_wanted(filter, frame))
        return false;
    if (filter->promisc)
        return true;
    if (memcmp(frame, broadcast, 6) == 0)
        return !filter->nobcast;
    if (frame[0] & 1)
        return !filter->nomulti && (filter->allmulti || in_table(filter, frame));
    if (filter->nouni)
        return false;
    return filter->alluni || memcmp(frame, filter->mac, 6) == 0 || in_table(filter, frame);
}
