"""What a guest can make the host's log hold, by a clock of the test's own."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avmm.log import LINE_EVERY_S, LINE_MAX, LINES_AT_ONCE, GuestLog

log = logging.getLogger("avmm.test")


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def texts(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_so_many_lines_at_once_and_then_a_few_and_the_rest_is_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    guest_log = GuestLog(clock)
    for at in range(1000):
        guest_log.write(log, logging.WARNING, "line %d", at)
    assert texts(caplog) == [f"line {at}" for at in range(LINES_AT_ONCE)]
    assert guest_log.left_out == 1000 - LINES_AT_ONCE
    caplog.clear()
    clock.now_s += LINE_EVERY_S
    guest_log.write(log, logging.WARNING, "later")
    guest_log.write(log, logging.WARNING, "at once")
    assert texts(caplog) == ["980 lines of a guest's doing were left out", "later"]
    caplog.clear()
    guest_log.tell()
    guest_log.tell()
    assert texts(caplog) == ["1 lines of a guest's doing were left out"]


@settings(deadline=None)
@given(st.lists(st.floats(0, 3 * LINE_EVERY_S), max_size=200))
def test_in_any_time_there_are_no_more_lines_than_that(gaps: list[float]) -> None:
    clock = Clock()
    guest_log = GuestLog(clock)
    admitted: list[float] = []
    for gap in gaps:
        clock.now_s += gap
        if guest_log.admits():
            admitted.append(clock.now_s)
    assert len(admitted) + guest_log.left_out == len(gaps)
    for first, began_s in enumerate(admitted):
        for last in range(first, len(admitted)):
            room = LINES_AT_ONCE + (admitted[last] - began_s) / LINE_EVERY_S
            assert last - first + 1 <= room + 1e-6


def test_a_line_is_of_a_bounded_length_with_its_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    try:
        raise ValueError("x" * 1_000_000)
    except ValueError as e:
        GuestLog().write(log, logging.ERROR, "it failed", error=e)
    (text,) = texts(caplog)
    assert text.startswith("it failed\nTraceback")
    assert len(text) < LINE_MAX + 100


def test_lines_that_nobody_wants_take_no_room(caplog: pytest.LogCaptureFixture) -> None:
    guest_log = GuestLog(Clock())
    with caplog.at_level(logging.WARNING, log.name):
        for _ in range(100):
            guest_log.write(log, logging.DEBUG, "detail")
        guest_log.write(log, logging.WARNING, "news")
    assert texts(caplog) == ["news"]
    assert guest_log.left_out == 0
