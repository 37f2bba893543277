"""The small fixed devices: clock, keyboard controller, power, pvpanic; and the bus they sit on."""

from __future__ import annotations

import calendar
import os
from collections.abc import Iterator

import pytest

from avmm.bus.bus import Bus
from avmm.bus.region import Deferred, Post
from avmm.errors import BugError
from avmm.legacy.acpi_pm import AcpiPm
from avmm.legacy.i8042 import I8042
from avmm.legacy.pvpanic import Pvpanic
from avmm.legacy.rtc_cmos import RtcCmos
from avmm.native import lib

NOON = calendar.timegm((2026, 11, 24, 15, 7, 9))  # a Tuesday
MIDNIGHT = calendar.timegm((1999, 12, 31, 0, 59, 59))


class Clock:
    """The clock at a moment."""

    def __init__(self, rtc: RtcCmos, now: int) -> None:
        self.native = rtc.native
        self.now = now

    def __getitem__(self, number: int) -> int:
        lib.av_rtc_write(self.native, 0, number)
        return lib.av_rtc_read(self.native, 1, self.now)

    def __setitem__(self, number: int, value: int) -> None:
        lib.av_rtc_write(self.native, 0, number)
        lib.av_rtc_write(self.native, 1, value)


@pytest.fixture
def rtc() -> Iterator[RtcCmos]:
    rtc = RtcCmos()
    yield rtc
    rtc.close()


def performed(deferred: Deferred | None) -> None:
    assert isinstance(deferred, Post)
    deferred.action()


def test_the_clock_is_right_in_bcd_with_24_hours(rtc: RtcCmos) -> None:
    clock = Clock(rtc, NOON)
    fields = [clock[n] for n in (0x32, 0x09, 0x08, 0x07, 0x06, 0x04, 0x02, 0x00)]
    assert fields == [0x20, 0x26, 0x11, 0x24, 3, 0x15, 0x07, 0x09]


def test_the_clock_is_right_in_binary_with_12_hours(rtc: RtcCmos) -> None:
    clock = Clock(rtc, NOON)
    clock[0x0B] = 0x04
    assert [clock[n] for n in (0x32, 0x09, 0x04)] == [20, 26, 0x83]
    clock = Clock(rtc, MIDNIGHT)
    clock[0x0B] = 0x00
    assert [clock[n] for n in (0x32, 0x04, 0x02)] == [0x19, 0x12, 0x59]


def test_the_clock_is_valid_never_updating_and_keeps_other_cells(rtc: RtcCmos) -> None:
    clock = Clock(rtc, NOON)
    assert clock[0x0A] & 0x80 == 0
    clock[0x0D] = 0
    assert clock[0x0D] == 0x80
    clock[0x40 | 0x80] = 0x23
    assert clock[0x40] == 0x23
    clock[0x00] = 0x55
    assert clock[0x00] == 0x09
    assert lib.av_rtc_read(rtc.native, 0, NOON) == 0xFF, "the index is not read, as on a PC"


def test_a_host_clock_beyond_reason_reads_as_ones(rtc: RtcCmos) -> None:
    assert Clock(rtc, 2**63 - 1)[0x00] == 0xFF


def test_the_keyboard_controller_resets_and_passes_its_self_test() -> None:
    resets: list[str] = []
    controller = I8042(lambda: resets.append("reset"))
    performed(controller.command.write(0, 1, 0xFE))
    assert resets == ["reset"]
    assert controller.command.read(0, 1) & 1 == 0
    assert controller.command.write(0, 1, 0xAA) is None
    assert controller.command.read(0, 1) & 1 == 1
    assert controller.data.read(0, 1) == 0x55
    assert controller.data.read(0, 1) == 0
    controller.command.write(0, 1, 0x60)
    controller.data.write(0, 1, 0x47)
    controller.command.write(0, 1, 0x20)
    assert controller.data.read(0, 1) == 0x47


def test_answers_nobody_reads_do_not_pile_up() -> None:
    controller = I8042(lambda: None)
    for _ in range(10_000):
        controller.command.write(0, 1, 0xAA)
    count = 0
    while controller.command.read(0, 1) & 1:
        controller.data.read(0, 1)
        count += 1
    assert count <= 16


def test_sleep_and_reset_are_posted_with_their_type() -> None:
    seen: list[object] = []
    power = AcpiPm(seen.append, lambda: seen.append("reset"), -1)
    performed(power.write(0, 1, 0x34))
    performed(power.write(2, 1, 1))
    assert seen == [5, "reset"]
    assert power.write(0, 1, 0x14) is None
    assert power.write(2, 1, 0) is None
    assert power.read(1, 1) == 0


def test_the_power_button_interrupts_and_is_read_once() -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    power = AcpiPm(lambda kind: None, lambda: None, fd)
    assert power.read(3, 1) == 0
    power.press_power_button()
    assert os.eventfd_read(fd) == 1
    assert (power.read(3, 1), power.read(3, 1)) == (1, 0)
    os.close(fd)


def test_a_panic_is_reported_and_a_crash_kernel_is_not_one() -> None:
    seen: list[str] = []
    device = Pvpanic(lambda: seen.append("panic"))
    assert device.read(0, 1) == 3
    assert device.write(0, 1, 2) is None
    performed(device.write(0, 1, 1))
    assert seen == ["panic"]


def test_a_bus_finds_the_region_and_the_offset_in_it() -> None:
    bus = Bus()
    first, second = Pvpanic(lambda: None), Pvpanic(lambda: None)
    bus.add(0x70, 2, first, "first")
    bus.add(0x10, 8, second, "second")
    assert bus.find(0x71, 1) == (first, 1)
    assert bus.find(0x10, 8) == (second, 0)
    assert [r.name for r in bus.ranges()] == ["second", "first"]


@pytest.mark.parametrize(("address", "size"), [(0x71, 2), (0x72, 1), (0x6F, 1), (0, 1), (0x6F, 4)])
def test_an_access_not_wholly_inside_a_range_is_unassigned(address: int, size: int) -> None:
    bus = Bus()
    bus.add(0x70, 2, Pvpanic(lambda: None), "only")
    assert bus.find(address, size) is None


@pytest.mark.parametrize("base", [0x6F, 0x70, 0x71])
def test_ranges_that_overlap_are_a_bug(base: int) -> None:
    bus = Bus()
    bus.add(0x70, 2, Pvpanic(lambda: None), "first")
    with pytest.raises(BugError, match="overlaps first"):
        bus.add(base, 2, Pvpanic(lambda: None), "second")
