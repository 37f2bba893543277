"""Each exit gets one of three verdicts, here and nowhere else.

ANSWER on the vCPU thread: registers without consequence. (The hottest are answered in C before
they come here: native/vcpu.c.)
CALL: a control write that the guest may rely on when its instruction ends; the thread waits while
the loop acts. Linux writes 0 to a virtio status register and does not poll: reset must be over.
POST: the loop is told, and the guest goes on; unless it is told faster than it can follow, for
then the guest waits as in CALL.

Which one it is, a device says by what its `write` returns: None, Call or Post.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from avmm.bus.bus import Bus
from avmm.bus.region import Call, Deferred
from avmm.loop import LoopBridge
from avmm.machine.reason import ExitKind, ExitReason
from avmm.machine.vcpu.wake import Gate
from avmm.native import CData, lib

_SYSTEM_EVENTS = {
    1: ExitReason(ExitKind.POWEROFF, "the guest asked KVM to shut down"),
    2: ExitReason(ExitKind.REBOOT, "the guest asked KVM to reset"),
    3: ExitReason(ExitKind.CRASH, "the guest reported a crash to KVM"),
}


class Exits:
    """What one VM's vCPU threads do with an exit that the C loop did not answer.

    drain_uart: takes what the guest sent off the full transmit ring; runs on the loop.
    """

    def __init__(
        self,
        *,
        pio: Bus,
        mmio: Bus,
        bridge: LoopBridge,
        gate: Gate,
        drain_uart: Callable[[], Awaitable[None] | None],
    ) -> None:
        self._pio = pio
        self._mmio = mmio
        self._bridge = bridge
        self._gate = gate
        self._drain_uart = drain_uart

    def handle(self, exit: CData) -> ExitReason | None:
        """Answer one `struct av_exit` on the vCPU thread; the reason when the VM ends by it.

        Raises LoopClosed when the VM is being taken down.
        """
        kind = exit.kind
        if kind == lib.AV_EXIT_MMIO_WRITE:
            self._write(self._mmio, exit)
        elif kind == lib.AV_EXIT_MMIO_READ:
            self._read(self._mmio, exit)
        elif kind == lib.AV_EXIT_PIO_WRITE:
            self._write(self._pio, exit)
        elif kind == lib.AV_EXIT_PIO_READ:
            self._read(self._pio, exit)
        elif kind == lib.AV_EXIT_UART_FULL:
            self._defer(Call(self._drain_uart))
        else:
            return _end(kind, int(exit.value))
        return None

    def _read(self, bus: Bus, exit: CData) -> None:
        ones = (1 << 8 * exit.size) - 1
        found = bus.find(exit.location, exit.size)
        if found is None:
            exit.value = ones
            return
        region, offset = found
        exit.value = region.read(offset, exit.size) & ones

    def _write(self, bus: Bus, exit: CData) -> None:
        found = bus.find(exit.location, exit.size)
        if found is None:
            return
        region, offset = found
        deferred = region.write(offset, exit.size, exit.value)
        if deferred is not None:
            self._defer(deferred)

    def _defer(self, deferred: Deferred) -> None:
        if isinstance(deferred, Call) or self._bridge.behind:
            with self._gate.resting():
                self._bridge.call_and_wait(deferred.action)
            if isinstance(deferred, Call) and deferred.after is not None:
                deferred.after()
        else:
            self._bridge.post(deferred.action)


def _end(kind: int, value: int) -> ExitReason:
    if kind == lib.AV_EXIT_SHUTDOWN:
        return ExitReason(ExitKind.CRASH, "triple fault")
    if kind == lib.AV_EXIT_HLT:
        return ExitReason(ExitKind.CRASH, "a vCPU halted with no way to wake it")
    if kind == lib.AV_EXIT_SYSTEM_EVENT:
        unknown = ExitReason(ExitKind.ERROR, f"unknown KVM system event {value}")
        return _SYSTEM_EVENTS.get(value, unknown)
    if kind == lib.AV_EXIT_FAIL_ENTRY:
        return ExitReason(ExitKind.ERROR, f"the processor refused the guest's state ({value:#x})")
    if kind == lib.AV_EXIT_INTERNAL_ERROR:
        return ExitReason(ExitKind.ERROR, f"KVM could not go on (internal error {value})")
    return ExitReason(ExitKind.ERROR, f"unknown KVM exit {value}")
