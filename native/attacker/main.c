#include "attacks.h"

void attack(void);

static const struct {
    const char *name;
    void (*run)(struct target *target);
} attacks[] = {
    { "rings", attack_rings },
    { "requests", attack_requests },
    { "setup", attack_setup },
    { "races", attack_races },
    { "storm", attack_storm },
    { "triple-fault", attack_triple_fault },
    { "nowhere", attack_nowhere },
    { "behave", behave },
    { "load", load },
};

void attack(void)
{
    struct target target;

    target_find(&target);
    for (unsigned i = 0; i < COUNT(attacks); i++)
        if (option_is("attack", attacks[i].name))
            attacks[i].run(&target);
}
