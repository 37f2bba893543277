"""The fixed devices of an x86-64 machine, wired to ports and interrupts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

from avmm.bus.bus import Bus
from avmm.eventfd import owned_eventfd
from avmm.kvm.vm import Vm
from avmm.legacy.acpi_pm import AcpiPm
from avmm.legacy.i8042 import I8042
from avmm.legacy.pvpanic import Pvpanic
from avmm.legacy.rtc_cmos import RtcCmos
from avmm.legacy.serial16550 import Serial16550
from avmm.machine.reason import ExitKind, ExitReason
from avmm.mem import layout


@dataclass(frozen=True, slots=True)
class Platform:
    """The buses with the fixed devices on them; the C loop knows serial and rtc, and serial and
    power are what avmm itself uses."""

    pio: Bus
    mmio: Bus
    serial: Serial16550
    rtc: RtcCmos
    power: AcpiPm


def add_platform(vm: Vm, stack: AsyncExitStack, end: Callable[[ExitReason], None]) -> Platform:
    """Make the fixed devices. end: called on the loop when the guest ends the machine."""

    def wired(gsi: int) -> int:
        fd = owned_eventfd(stack)
        vm.irqfd(fd, gsi)
        return fd

    def on_reset() -> None:
        end(ExitReason(ExitKind.REBOOT, "the guest asked for a reset"))

    def on_sleep(sleep_type: int) -> None:
        end(ExitReason(ExitKind.POWEROFF, f"the guest entered ACPI sleep type {sleep_type}"))

    def on_panic() -> None:
        end(ExitReason(ExitKind.CRASH, "the guest's kernel panicked (pvpanic)"))

    serial = Serial16550(wired(layout.GSI_COM1))
    stack.callback(serial.close)
    power = AcpiPm(on_sleep, on_reset, wired(layout.GSI_ACPI_EVENT))
    rtc = RtcCmos()
    stack.callback(rtc.close)
    i8042 = I8042(on_reset)
    pio = Bus()
    pio.add(layout.PORT_I8042_DATA, 1, i8042.data, "i8042 data")
    pio.add(layout.PORT_I8042_COMMAND, 1, i8042.command, "i8042 command")
    pio.add(layout.PORT_PVPANIC, 1, Pvpanic(on_panic), "pvpanic")
    pio.add(layout.PORT_ACPI, layout.PORT_ACPI_BYTES, power, "acpi")
    return Platform(pio=pio, mmio=Bus(), serial=serial, rtc=rtc, power=power)
