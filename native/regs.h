/* Registers that the C loop of a vCPU answers by itself, as far as Python leaves them to it. */
#ifndef AV_REGS_H
#define AV_REGS_H

#include <stdbool.h>
#include <stdint.h>

/* cdef begin */
/* A block of registers at a guest physical address: a PCI function's configuration space, an
 * MSI-X table. Each bit is constant or writable; of the writable ones some are watched: a write
 * that would change one of these is an exit to Python, which makes the change itself.
 * Any thread; an access is atomic a byte at a time, as a guest's own locking has it. */
struct av_regs;
struct av_regs *av_regs_create(uint32_t size_bytes); /* all zeros, constant, nowhere. NULL: errno */
void av_regs_destroy(struct av_regs *regs);
/* In the next four: size 1 to 8 bytes, little-endian; bytes past the end are not there. */
void av_regs_define(struct av_regs *regs, uint32_t offset, uint32_t size, uint64_t value,
                    uint64_t writable);
void av_regs_watch(struct av_regs *regs, uint32_t offset, uint32_t size, uint64_t bits);
uint64_t av_regs_get(const struct av_regs *regs, uint32_t offset, uint32_t size);
/* The guest's write, carried out for it: writable bits only, watched ones too. */
void av_regs_put(struct av_regs *regs, uint32_t offset, uint32_t size, uint64_t value);
/* From now on every write to these bytes is an exit to Python, and by `reads` every read. */
void av_regs_hand_over(struct av_regs *regs, uint32_t offset, uint32_t size, bool reads);
void av_regs_move(struct av_regs *regs, uint64_t gpa); /* UINT64_MAX: nowhere */
/* What a vCPU does. Whether the block is at `gpa` now; *offset: in it. */
bool av_regs_at(const struct av_regs *regs, uint64_t gpa, uint32_t *offset);
/* A guest's access, size 1 to 8; false when it is Python's and nothing was done. */
bool av_regs_read(const struct av_regs *regs, uint32_t offset, uint32_t size, uint8_t *data);
bool av_regs_write(struct av_regs *regs, uint32_t offset, uint32_t size, const uint8_t *data);
/* cdef end */

#endif
