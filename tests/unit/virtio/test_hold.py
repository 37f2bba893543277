"""When an interrupt is held back, by a clock of the test's own."""

from __future__ import annotations

from avmm.native import CData, ffi, lib

WAIT_MAX_NS = 400_000


class Driver:
    """Makes `depth` requests, one every `gap_ns`, and waits for an interrupt when all are made."""

    def __init__(self, depth: int, gap_ns: int) -> None:
        self.hold: CData = ffi.new("struct av_hold *")
        lib.av_hold_init(self.hold)
        self.gap_ns = gap_ns
        self.depth = depth
        self.now_ns = 10**9
        self.requests = 0
        self.interrupts = 0
        self.waited_ns = 0

    def run(self, requests: int) -> None:
        """Serve this many, each as soon as it is made, unless a hold says to look later."""
        target = self.requests + requests
        while self.requests < target:
            made = 1
            self.now_ns += self.gap_ns
            until_ns = lib.av_hold_until(self.hold, 1, 1, self.now_ns)
            while until_ns:
                room = self.depth - made
                fresh = min(room, (until_ns - self.now_ns) // self.gap_ns)
                if fresh == 0 and room == 0:
                    self.waited_ns += until_ns - self.now_ns
                self.now_ns = until_ns
                made += fresh
                until_ns = lib.av_hold_until(self.hold, fresh, 1, self.now_ns)
            self.requests += made
            self.interrupts += 1


def test_a_driver_with_many_requests_has_one_interrupt_for_several() -> None:
    for gap_ns in (2_000, 30_000, 250_000):
        driver = Driver(32, gap_ns)
        driver.run(2000)
        before = driver.interrupts
        driver.run(2000)
        assert driver.interrupts - before <= 2000 / 4, f"{gap_ns} ns between requests"


def test_a_driver_that_never_runs_out_never_waits() -> None:
    driver = Driver(32, 5_000)
    driver.run(2000)
    before_ns = driver.waited_ns
    driver.run(2000)
    assert driver.waited_ns == before_ns


def test_a_driver_with_one_request_at_a_time_hardly_ever_waits() -> None:
    driver = Driver(1, 50_000)
    driver.run(100)
    before_ns, began_ns = driver.waited_ns, driver.now_ns
    driver.run(20_000)
    assert driver.waited_ns - before_ns < (driver.now_ns - began_ns) * 0.01


def test_many_at_once_end_the_doubts_about_a_driver() -> None:
    driver = Driver(1, 50_000)
    driver.run(1000)
    hold = driver.hold
    assert hold.skip > 0
    assert lib.av_hold_until(hold, 1, 1, driver.now_ns) == 0
    assert lib.av_hold_until(hold, 5, 1, driver.now_ns) > driver.now_ns


def test_what_needs_no_interrupt_is_shown_at_once() -> None:
    hold = ffi.new("struct av_hold *")
    lib.av_hold_init(hold)
    assert lib.av_hold_until(hold, 1, 0, 1000) == 0
    assert lib.av_hold_until(hold, 1, 1, 1000) > 1000
    assert lib.av_hold_until(hold, 1, 0, 1001) == 0, "the driver looks at the ring by itself now"
    assert hold.count == 0


def test_a_hold_ends_in_time_whatever_comes() -> None:
    hold = ffi.new("struct av_hold *")
    lib.av_hold_init(hold)
    now_ns = began_ns = 1000
    until_ns = lib.av_hold_until(hold, 1, 1, now_ns)
    looks = 0
    while until_ns:
        assert now_ns < until_ns <= now_ns + WAIT_MAX_NS
        now_ns = until_ns
        until_ns = lib.av_hold_until(hold, 1, 1, now_ns)
        looks += 1
    assert looks < 16
    assert now_ns - began_ns < 16 * WAIT_MAX_NS


def test_a_look_that_comes_early_changes_nothing() -> None:
    hold = ffi.new("struct av_hold *")
    lib.av_hold_init(hold)
    until_ns = lib.av_hold_until(hold, 1, 1, 1000)
    assert lib.av_hold_until(hold, 0, 1, 1001) == until_ns
    assert lib.av_hold_until(hold, 2, 1, 1002) == until_ns
    assert hold.count == 3
