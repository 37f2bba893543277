/* Which address is behind which port: a table of a fixed size, eight places for each set of
 * addresses. A port may only have so many, so no guest can drive out the others' by making some up. */
#include "switch_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define WAYS 8u
#define SWEEP_EVERY_NS 1000000000u

int av_table_init(struct av_table *table, const struct av_switch_setup *setup, uint64_t secret)
{
    uint32_t sets = 1;

    while (sets * WAYS < setup->addresses_max)
        sets *= 2;
    table->address = calloc((size_t)sets * WAYS, sizeof(*table->address));
    if (table->address == NULL)
        return -ENOMEM;
    table->sets = sets;
    table->port_max = setup->port_addresses_max;
    table->age_ns = setup->age_ns;
    table->secret = secret;
    for (uint32_t i = 0; i < sets * WAYS; i++)
        table->address[i].port = AV_SWITCH_NOBODY;
    return 0;
}

static struct av_address *set_of(const struct av_table *table, const uint8_t *mac)
{
    uint64_t key = table->secret;

    for (uint32_t i = 0; i < 6; i++)
        key = (key ^ mac[i]) * 0x100000001b3u;
    key ^= key >> 29;
    key *= 0xbf58476d1ce4e5b9u;
    return &table->address[(key >> 32 & (table->sets - 1)) * WAYS];
}

static bool is_old(const struct av_table *table, const struct av_address *address, uint64_t now_ns)
{
    return now_ns > address->heard_ns && now_ns - address->heard_ns > table->age_ns;
}

static void release(struct av_switch *sw, struct av_address *address)
{
    sw->port[address->port]->stats.addresses--;
    sw->stats.addresses--;
    address->port = AV_SWITCH_NOBODY;
}

static void sweep(struct av_switch *sw, uint32_t port, uint64_t now_ns)
{
    struct av_table *table = &sw->table;

    if (now_ns < sw->port[port]->swept_ns + SWEEP_EVERY_NS)
        return;
    sw->port[port]->swept_ns = now_ns;
    for (uint32_t i = 0; i < table->sets * WAYS; i++)
        if (table->address[i].port == port && is_old(table, &table->address[i], now_ns))
            release(sw, &table->address[i]);
}

uint32_t av_table_find(const struct av_table *table, const uint8_t *mac, uint64_t now_ns)
{
    const struct av_address *set = set_of(table, mac);

    for (uint32_t i = 0; i < WAYS; i++)
        if (set[i].port != AV_SWITCH_NOBODY && memcmp(set[i].mac, mac, 6) == 0)
            return is_old(table, &set[i], now_ns) ? AV_SWITCH_NOBODY : set[i].port;
    return AV_SWITCH_NOBODY;
}

/* A place for one more address of the port; NULL: there is none. */
static struct av_address *place(struct av_switch *sw, struct av_address *set, uint32_t port,
                                uint64_t now_ns)
{
    struct av_address *own = NULL, *old = NULL;
    bool at_limit;

    if (sw->port[port]->stats.addresses >= sw->table.port_max)
        sweep(sw, port, now_ns);
    at_limit = sw->port[port]->stats.addresses >= sw->table.port_max;
    for (uint32_t i = 0; i < WAYS; i++) {
        if (set[i].port == AV_SWITCH_NOBODY && !at_limit)
            return &set[i];
        if (set[i].port == AV_SWITCH_NOBODY)
            continue;
        if (set[i].port == port && (own == NULL || set[i].heard_ns < own->heard_ns))
            own = &set[i];
        if (is_old(&sw->table, &set[i], now_ns))
            old = &set[i];
    }
    return at_limit || old == NULL ? own : old;
}

void av_table_learn(struct av_switch *sw, uint32_t port, const uint8_t *mac, uint64_t now_ns)
{
    struct av_address *set = set_of(&sw->table, mac), *address = NULL;

    for (uint32_t i = 0; i < WAYS; i++)
        if (set[i].port != AV_SWITCH_NOBODY && memcmp(set[i].mac, mac, 6) == 0)
            address = &set[i];
    if (address != NULL && address->port == port) {
        address->heard_ns = now_ns;
        return;
    }
    if (address != NULL) {
        /* It moved. Behind a port at its limit it is nowhere. */
        release(sw, address);
        sw->stats.moved++;
    }
    address = place(sw, set, port, now_ns);
    if (address == NULL) {
        sw->stats.unlearned++;
        return;
    }
    if (address->port != AV_SWITCH_NOBODY)
        release(sw, address);
    memcpy(address->mac, mac, 6);
    address->port = port;
    address->heard_ns = now_ns;
    sw->port[port]->stats.addresses++;
    sw->stats.addresses++;
}

void av_table_forget_port(struct av_switch *sw, uint32_t port)
{
    for (uint32_t i = 0; i < sw->table.sets * WAYS; i++)
        if (sw->table.address[i].port == port)
            release(sw, &sw->table.address[i]);
}
