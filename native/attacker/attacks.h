/* What the command line's attack= may say; each prints lines that `attack` in bench/attacker.py
 * understands. */
#ifndef ATTACKS_H
#define ATTACKS_H

#include "target.h"

void attack_rings(struct target *target);
void attack_requests(struct target *target);
void attack_setup(struct target *target);
/* With vCPUs that get in each other's way. */
void attack_races(struct target *target);
/* These do not end by themselves. */
void attack_storm(struct target *target);
void attack_triple_fault(struct target *target);
void attack_nowhere(struct target *target);
/* No attack: sound requests for ever, a dot for some of them. */
void behave(struct target *target);
/* Reads of a disk, some at a time, and no register meanwhile. */
void load(struct target *target);

#endif
