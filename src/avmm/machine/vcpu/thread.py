"""A vCPU's thread: KVM_RUN in C, what is left of the exits in Python."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass

from avmm.errors import HostError
from avmm.kvm.vcpu import Vcpu
from avmm.loop import LoopBridge, LoopClosed
from avmm.machine.reason import ExitKind, ExitReason
from avmm.machine.vcpu.exits import Exits
from avmm.machine.vcpu.wake import Gate
from avmm.native import CData, ffi, lib


@dataclass(frozen=True, slots=True)
class VcpuStatistics:
    """Exits since creation, by where they were answered.

    pio, mmio: in Python; uart, interrupt, registers, unassigned: in C, without the GIL.
    python_ns: time the thread spent outside the C loop, all exits together.
    delays: times it slept because the microVM had used up Config(exit_share=...); delayed_ns: and
    for how long, all together.
    """

    pio: int
    mmio: int
    uart: int
    interrupt: int
    registers: int
    unassigned: int
    signals: int
    other: int
    python_ns: int
    delays: int
    delayed_ns: int


class VcpuThread:
    """Owns the thread and the native state of one vCPU; `vcpu` is borrowed.

    on_end: called on the loop with the reason when this vCPU ends the VM.
    Made, started and closed on the loop's thread.
    """

    def __init__(
        self,
        vcpu: Vcpu,
        *,
        run_bytes: int,
        dispatch: CData,
        exits: Exits,
        gate: Gate,
        bridge: LoopBridge,
        on_end: Callable[[ExitReason], None],
    ) -> None:
        error = ffi.new("int *")
        self._native = lib.av_vcpu_create(vcpu.fd, run_bytes, dispatch, error)
        if not self._native:
            remedy = "another library uses the vCPU's signal" if error[0] == 16 else None
            raise HostError("vcpu", op="vCPU mmap", errno=error[0], remedy=remedy)
        self._exits = exits
        self._gate = gate
        self._bridge = bridge
        self._on_end = on_end
        # A daemon, or a program that forgot a microVM on a loop it closed would never end.
        name = f"avmm-vcpu{vcpu.index}"
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread; it parks at the gate."""
        try:
            self._thread.start()
        except RuntimeError as e:
            raise HostError("thread", op="Starting a vCPU thread", remedy=str(e)) from e

    def kick(self) -> None:
        """Make the present or next KVM_RUN return; any thread."""
        if self._native:
            lib.av_vcpu_kick(self._native)

    def statistics(self) -> VcpuStatistics:
        """Counters as of now; any thread."""
        stats = ffi.new("struct av_vcpu_stats *")
        if self._native:
            lib.av_vcpu_statistics(self._native, stats)
        return VcpuStatistics(
            pio=stats.pio_python,
            mmio=stats.mmio_python,
            uart=stats.uart,
            interrupt=stats.interrupt,
            registers=stats.registers,
            unassigned=stats.unassigned,
            signals=stats.signals,
            other=stats.other,
            python_ns=stats.python_ns,
            delays=stats.delays,
            delayed_ns=stats.delayed_ns,
        )

    def close(self) -> None:
        """Wait for the thread, which Gate.stop() has ended, and free the native state."""
        if self._thread.ident is not None:
            self._thread.join()
        if self._native:
            lib.av_vcpu_destroy(self._native)
            self._native = ffi.NULL

    def _main(self) -> None:
        reason: ExitReason | None = None
        try:
            reason = self._run()
        except LoopClosed:
            pass  # the VM is being taken down, which is why the loop does not answer
        except BaseException as e:
            reason = ExitReason(ExitKind.ERROR, f"{type(e).__name__}: {e}")
        finally:
            self._gate.ended()
        if reason is not None:
            ended = reason
            with contextlib.suppress(LoopClosed):
                self._bridge.post(lambda: self._on_end(ended))

    def _run(self) -> ExitReason | None:
        result = lib.av_vcpu_enter_thread()
        if result < 0:
            raise HostError("thread", op="pthread_sigmask", errno=-result)
        exit = ffi.new("struct av_exit *")
        native, run, handle = self._native, lib.av_vcpu_run, self._exits.handle
        kicked = lib.AV_EXIT_KICKED
        if not self._gate.park():
            return None
        while True:
            result = run(native, exit)
            if result < 0:
                raise HostError("vcpu", op="KVM_RUN", errno=-result)
            if exit.kind == kicked:
                if not self._gate.park():
                    return None
                continue
            reason = handle(exit)
            if reason is not None:
                return reason
