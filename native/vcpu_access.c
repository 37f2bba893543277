/* Accesses of ports and memory: those answered here, and those handed to Python. */
#include <string.h>
#include <time.h>

#include "vcpu_internal.h"

#define UART_PORTS 8
#define RTC_PORTS 2
#define MMIO_INTERRUPT_STATUS 0x60 /* virtio 1.3 section 4.2.2 */
#define MMIO_INTERRUPT_ACK 0x64
#define PCI_ADDRESS_PORT 0xCF8 /* PCI Local Bus 3.0 section 3.2.2.3.2 */
#define PCI_DATA_PORT 0xCFC
#define PCI_PORTS 8

uint8_t *av_vcpu_pio_data(struct av_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    return (uint8_t *)run + run->io.data_offset + (size_t)vcpu->pio_done * run->io.size;
}

/* An access that is Python's to answer. */
static void hand_out(struct av_exit *out, bool mmio, bool write, uint64_t location,
                     const uint8_t *data, uint32_t size)
{
    if (mmio)
        out->kind = write ? AV_EXIT_MMIO_WRITE : AV_EXIT_MMIO_READ;
    else
        out->kind = write ? AV_EXIT_PIO_WRITE : AV_EXIT_PIO_READ;
    out->location = location;
    out->size = size;
    out->value = 0;
    if (write)
        memcpy(&out->value, data, size);
}

enum answer { ANSWERED, FOR_PYTHON, UNASSIGNED };

/* An access to registers that are, in part, answered here. */
static enum answer registers(struct av_vcpu *vcpu, uint64_t gpa, bool write, uint8_t *data,
                             uint32_t size, struct av_exit *out)
{
    const struct av_dispatch *dispatch = vcpu->dispatch;
    uint32_t offset;

    for (uint32_t i = 0; i < dispatch->regs_count; i++) {
        struct av_regs *regs = dispatch->regs[i];
        if (!av_regs_at(regs, gpa, &offset))
            continue;
        if (write ? av_regs_write(regs, offset, size, data)
                  : av_regs_read(regs, offset, size, data)) {
            av_count(&vcpu->stats.registers, 1);
            return ANSWERED;
        }
        av_count(&vcpu->stats.mmio_python, 1);
        hand_out(out, true, write, gpa, data, size);
        return FOR_PYTHON;
    }
    return UNASSIGNED;
}

/* The ports that lead to PCI configuration space. */
static enum answer pci_port(struct av_vcpu *vcpu, bool write, uint8_t *data, struct av_exit *out)
{
    struct av_dispatch *dispatch = vcpu->dispatch;
    uint32_t port = vcpu->run->io.port, size = vcpu->run->io.size, address;

    if (port == PCI_ADDRESS_PORT && size == sizeof(address)) {
        if (write) {
            memcpy(&address, data, sizeof(address));
            atomic_store(&dispatch->pci_address, address);
        } else {
            address = atomic_load(&dispatch->pci_address);
            memcpy(data, &address, sizeof(address));
        }
        av_count(&vcpu->stats.registers, 1);
        return ANSWERED;
    }
    address = atomic_load(&dispatch->pci_address);
    if (port < PCI_DATA_PORT || address >> 24 != 0x80)
        return UNASSIGNED;
    /* Bus, device and function are 4 bits further up in the memory-mapped address. */
    return registers(vcpu, dispatch->ecam + ((uint64_t)(address & 0xffff00) << 4 |
                                             (address & 0xfc) | (port & 3)),
                     write, data, size, out);
}

/* One element of a port access; true when Python has to see it. */
static bool pio_element(struct av_vcpu *vcpu, struct av_exit *out)
{
    const struct av_dispatch *dispatch = vcpu->dispatch;
    struct kvm_run *run = vcpu->run;
    uint8_t *data = av_vcpu_pio_data(vcpu);
    bool write = run->io.direction == KVM_EXIT_IO_OUT;
    uint64_t offset = run->io.port - dispatch->uart_port;
    uint64_t rtc_offset = run->io.port - dispatch->rtc_port;
    uint32_t pci_port_offset = (uint32_t)run->io.port - PCI_ADDRESS_PORT;
    enum answer answer;

    if (dispatch->uart != NULL && offset < UART_PORTS && run->io.size == 1) {
        av_count(&vcpu->stats.uart, 1);
        if (!write) {
            *data = (uint8_t)av_uart_read(dispatch->uart, (uint32_t)offset);
            return false;
        }
        if (av_uart_write(dispatch->uart, (uint32_t)offset, *data) == 0)
            return false;
        out->kind = AV_EXIT_UART_FULL;
        return true;
    }
    if (dispatch->rtc != NULL && rtc_offset < RTC_PORTS && run->io.size == 1) {
        av_count(&vcpu->stats.registers, 1);
        if (write)
            av_rtc_write(dispatch->rtc, (uint32_t)rtc_offset, *data);
        else
            *data = av_rtc_read(dispatch->rtc, (uint32_t)rtc_offset, time(NULL));
        return false;
    }
    if (dispatch->ecam_bytes != 0 && pci_port_offset < PCI_PORTS) {
        answer = pci_port(vcpu, write, data, out);
        if (answer != UNASSIGNED)
            return answer == FOR_PYTHON;
    }
    if (!av_range_table_has(&dispatch->pio, run->io.port)) {
        av_count(&vcpu->stats.unassigned, 1);
        if (!write)
            memset(data, 0xff, run->io.size);
        return false;
    }
    av_count(&vcpu->stats.pio_python, 1);
    hand_out(out, false, write, run->io.port, data, run->io.size);
    return true;
}

bool av_vcpu_pio_go_on(struct av_vcpu *vcpu, struct av_exit *out)
{
    for (; vcpu->pio_done < vcpu->run->io.count; vcpu->pio_done++) {
        if (pio_element(vcpu, out)) {
            vcpu->pending = PENDING_PIO;
            return true;
        }
    }
    vcpu->pending = PENDING_NONE;
    return false;
}

static bool mmio_interrupt(struct av_vcpu *vcpu, struct av_interrupt *interrupt, uint64_t offset)
{
    struct kvm_run *run = vcpu->run;
    uint32_t value;

    if (run->mmio.len != sizeof(value))
        return false;
    if (offset == MMIO_INTERRUPT_STATUS && !run->mmio.is_write) {
        value = av_interrupt_status(interrupt);
        memcpy(run->mmio.data, &value, sizeof(value));
    } else if (offset == MMIO_INTERRUPT_ACK && run->mmio.is_write) {
        memcpy(&value, run->mmio.data, sizeof(value));
        av_interrupt_ack(interrupt, value);
    } else {
        return false;
    }
    av_count(&vcpu->stats.interrupt, 1);
    return true;
}

bool av_vcpu_mmio_exit(struct av_vcpu *vcpu, struct av_exit *out)
{
    const struct av_dispatch *dispatch = vcpu->dispatch;
    struct kvm_run *run = vcpu->run;
    uint64_t gpa = run->mmio.phys_addr;
    enum answer answer;

    for (uint32_t i = 0; i < dispatch->interrupts; i++) {
        uint64_t offset = gpa - dispatch->interrupt[i].mmio_base;
        if (offset == MMIO_INTERRUPT_STATUS || offset == MMIO_INTERRUPT_ACK) {
            if (mmio_interrupt(vcpu, dispatch->interrupt[i].interrupt, offset))
                return false;
            break;
        }
    }
    answer = registers(vcpu, gpa, run->mmio.is_write, run->mmio.data, run->mmio.len, out);
    if (answer == ANSWERED)
        return false;
    if (answer == FOR_PYTHON) {
        vcpu->pending = PENDING_MMIO;
        return true;
    }
    if (gpa - dispatch->ecam < dispatch->ecam_bytes ||
        !av_range_table_has(&dispatch->mmio, gpa)) {
        av_count(&vcpu->stats.unassigned, 1);
        if (!run->mmio.is_write)
            memset(run->mmio.data, 0xff, sizeof(run->mmio.data));
        return false;
    }
    av_count(&vcpu->stats.mmio_python, 1);
    hand_out(out, true, run->mmio.is_write, gpa, run->mmio.data, run->mmio.len);
    vcpu->pending = PENDING_MMIO;
    return true;
}
