"""Builds a machine from its configuration, one short step after another.

Every step hands what it made to the exit stack, so a failure anywhere gives everything back in
reverse order; the same stack takes a running machine down.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from avmm.agent.program import agent_archive, archive_by
from avmm.boot.entry import EntryRegs
from avmm.boot.load import BootSource, load
from avmm.descriptors import Opener, open_path
from avmm.errors import AvmmError, HostError
from avmm.hostnet.tap import TapOpener, open_tap
from avmm.kvm.system import KVM_PATH, CpuidEntry, Kvm
from avmm.kvm.vcpu import Vcpu
from avmm.kvm.vm import Vm
from avmm.log import GuestLog
from avmm.loop import LoopBridge, on_thread
from avmm.machine.config import Config
from avmm.machine.console import SerialConsole
from avmm.machine.lifecycle import uninterrupted
from avmm.machine.mmio_slots import MmioSlots, acpi_devices
from avmm.machine.parts import Parts, Reports
from avmm.machine.pci_slots import PciSlots, acpi_root
from avmm.machine.platform import Platform, add_platform
from avmm.machine.reason import ExitKind, ExitReason
from avmm.machine.slots import Backplane, Slot, Surroundings, assign_slots, plug
from avmm.machine.vcpu.budget import Budget
from avmm.machine.vcpu.exits import Exits
from avmm.machine.vcpu.setup import set_up
from avmm.machine.vcpu.thread import VcpuThread
from avmm.machine.vcpu.wake import Gate
from avmm.mem import layout
from avmm.mem.guest import GuestMemory
from avmm.native import CData, ffi, lib
from avmm.virtio.home import Homes

log = logging.getLogger(__name__)


async def build(
    config: Config,
    stack: AsyncExitStack,
    reports: Reports,
    opener: Opener = open_path,
    open_tap: TapOpener = open_tap,
) -> Parts:
    """The machine, ready to run: its vCPU threads wait at the gate. opener, open_tap: of all its
    files and TAPs."""

    def on_error(error: BaseException) -> None:
        known = error if isinstance(error, AvmmError) else None
        reports.end(ExitReason(ExitKind.ERROR, f"{type(error).__name__}: {error}", known))

    guest_log = GuestLog()
    stack.callback(guest_log.tell)
    kvm = Kvm.open(KVM_PATH, opener)
    stack.callback(kvm.close)
    kvm.require_capabilities()
    config.check_host()
    slots = assign_slots(config)
    memory = GuestMemory.create(config.memory_bytes, hugepages=config.hugepages)
    stack.callback(memory.close)
    async with _preparing(kvm, memory, config, slots, opener) as preparing:
        vm = _create_vm(kvm, memory, stack)
        platform = add_platform(vm, stack, reports.end)
        homes = Homes.create(
            asyncio.get_running_loop(), threads=config.io_threads, poll_us=config.io_poll_us
        )
        stack.callback(homes.close)
        backplane = _backplane(config, kvm, vm, platform, stack)
        surroundings = Surroundings(
            memory,
            homes,
            stack,
            config.cpus,
            on_error,
            reports.fault,
            reports.ready,
            reports.link,
            guest_log,
            opener,
            open_tap,
        )
        devices = await plug(slots, backplane, surroundings)
        prepared = await asyncio.shield(preparing)
    budget = _budget(config, vm, stack)
    charged = contextlib.nullcontext if budget is None else budget.charged
    console = SerialConsole(platform.serial, config.scrollback_bytes, charged)
    stack.callback(reports.console_closed)
    stack.callback(console.close)
    console.start()
    gate = Gate(asyncio.get_running_loop(), config.cpus)
    bridge = LoopBridge(asyncio.get_running_loop(), on_error, charged)
    exits = Exits(
        pio=platform.pio, mmio=platform.mmio, bridge=bridge, gate=gate, drain_uart=console.make_room
    )
    dispatch = _dispatch(platform, backplane, stack)
    if budget is not None:
        lib.av_dispatch_set_budget(dispatch, budget.native)
    vcpus = _create_vcpus(kvm, vm, config.cpus, prepared, stack)
    run_bytes = kvm.run_bytes()
    threads: list[VcpuThread] = []
    stack.push_async_callback(_end_threads, threads, gate, bridge)
    for vcpu in vcpus:
        thread = VcpuThread(
            vcpu,
            run_bytes=run_bytes,
            dispatch=dispatch,
            exits=exits,
            gate=gate,
            bridge=bridge,
            on_end=reports.end,
        )
        threads.append(thread)
    gate.kicks = [thread.kick for thread in threads]
    for thread in threads:
        thread.start()
    return Parts(
        gate,
        console.console,
        platform.serial,
        platform.power,
        tuple(threads),
        devices,
        homes,
        guest_log,
    )


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What takes a while and needs nothing else of the machine."""

    registers: EntryRegs
    supported: list[CpuidEntry]


def _prepare(kvm: Kvm, memory: GuestMemory, source: BootSource) -> _Prepared:
    return _Prepared(load(memory, source), kvm.supported_cpuid())


@asynccontextmanager
async def _preparing(
    kvm: Kvm, memory: GuestMemory, config: Config, slots: Sequence[Slot], opener: Opener
) -> AsyncIterator[asyncio.Future[_Prepared]]:
    """Load the kernel and ask for CPUID on a thread while the body runs: unpacking a kernel takes
    long, and the user's loop has other work. What the thread uses is not given back before it is
    done."""
    source = BootSource(
        kernel=config.kernel,
        initrd=config.initrd,
        cmdline=config.full_cmdline(),
        cpus=config.cpus,
        devices=acpi_devices(slots) if config.transport == "mmio" else (),
        pci=acpi_root(config.memory_bytes) if config.transport == "pci" else None,
        kernel_format=config.kernel_format,
        initrd_extra=_agent(config, opener),
        opener=opener,
    )
    preparing = on_thread(_prepare, kvm, memory, source)

    async def settled() -> None:
        await asyncio.wait([preparing])

    try:
        yield preparing
    finally:
        await uninterrupted(settled())
        preparing.exception()  # seen: when the body failed first, that error is raised


def _agent(config: Config, opener: Opener) -> bytes:
    if not (config.agent and config.initrd):
        return b""
    init = config.next_init()
    return agent_archive(init) if opener is open_path else archive_by(opener, init)


def _create_vm(kvm: Kvm, memory: GuestMemory, stack: AsyncExitStack) -> Vm:
    vm = kvm.create_vm()
    stack.push_async_callback(_close_vm, vm)
    # Memory first: behind the interrupt controller's tables each slot waits for the readers of
    # those (an SRCU grace period), which took 7 ms instead of 0.3.
    for slot, region in enumerate(memory.regions):
        vm.set_memory(slot, region.gpa, region.size_bytes, region.hva)
    vm.set_identity_map(layout.KVM_IDENTITY_MAP)
    vm.set_tss(layout.KVM_TSS)
    vm.create_irqchip()
    vm.create_pit()
    return vm


async def _close_vm(vm: Vm) -> None:
    """Freeing a VM waits for grace periods, up to 20 ms: nothing for the loop of other VMs."""
    try:
        closing = on_thread(vm.close)
    except HostError as e:
        log.warning("Freeing a VM on the event loop: %s", e)
        vm.close()
    else:
        await asyncio.shield(closing)


def _backplane(
    config: Config, kvm: Kvm, vm: Vm, platform: Platform, stack: AsyncExitStack
) -> Backplane:
    if config.transport == "mmio":
        return MmioSlots(vm, platform.mmio, stack)
    any_length = bool(kvm.extension("ioeventfd_any_length"))
    return PciSlots(vm, platform.mmio, config.memory_bytes, stack, any_length=any_length)


def _budget(config: Config, vm: Vm, stack: AsyncExitStack) -> Budget | None:
    if config.exit_share == 1:
        return None
    budget = Budget(config.exit_share, lambda: vm.blocked_ns)
    stack.callback(budget.close)
    return budget


def _dispatch(platform: Platform, backplane: Backplane, stack: AsyncExitStack) -> CData:
    """What the C loop answers by itself, and what it hands to Python."""
    dispatch = lib.av_dispatch_create()
    if not dispatch:
        raise HostError("memory", op="Exit dispatch", errno=ffi.errno)
    stack.callback(lib.av_dispatch_destroy, dispatch)
    results = [lib.av_dispatch_add_uart(dispatch, layout.PORT_COM1, platform.serial.native)]
    results += [lib.av_dispatch_add_rtc(dispatch, layout.PORT_CMOS_INDEX, platform.rtc.native)]
    results += [lib.av_dispatch_add_pio(dispatch, r.base, r.size) for r in platform.pio.ranges()]
    results += [lib.av_dispatch_add_mmio(dispatch, r.base, r.size) for r in platform.mmio.ranges()]
    results += backplane.dispatch(dispatch)
    if min(results) < 0:
        raise HostError("devices", op="Exit dispatch", errno=-min(results))
    return dispatch


def _create_vcpus(
    kvm: Kvm, vm: Vm, cpus: int, prepared: _Prepared, stack: AsyncExitStack
) -> list[Vcpu]:
    tsc_deadline = bool(kvm.extension("tsc_deadline_timer"))
    vcpus: list[Vcpu] = []
    for index in range(cpus):
        vcpu = vm.create_vcpu(index)
        stack.callback(vcpu.close)
        entry = prepared.registers if index == 0 else None
        set_up(vcpu, cpus, prepared.supported, entry, tsc_deadline=tsc_deadline)
        vcpus.append(vcpu)
    return vcpus


async def _end_threads(threads: list[VcpuThread], gate: Gate, bridge: LoopBridge) -> None:
    """The first step down: no guest instruction after this."""
    gate.stop()
    await bridge.close()
    for thread in threads:
        thread.close()
