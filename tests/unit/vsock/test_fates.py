"""The memory in which two processes say how connections ended."""

from __future__ import annotations

import os

import pytest

from avmm.native import lib
from avmm.vsock.fates import FATES, Fates, LaneFates
from avmm.vsock.reasons import Reason, reset_error


@pytest.fixture
def fates() -> Fates:
    return Fates()


def test_both_sides_see_what_the_other_writes(fates: Fates) -> None:
    lane = LaneFates(fates.fd)
    fate = fates.take()
    assert fate is not None
    lane.at(fate).lane = lib.AV_VSOCK_ENDED
    fates.abort(fate)
    assert fates.ends(fate) == lib.AV_VSOCK_ENDED
    assert lane.at(fate).program == lib.AV_VSOCK_ABORTED
    assert not lane.at(None)
    fates.close()


def test_whatever_the_lane_writes_is_a_reason(fates: Fates) -> None:
    lane = LaneFates(fates.fd)
    fate = fates.take()
    assert fate is not None
    assert fates.reason(fate) is Reason.MICROVM_ENDED
    for value in range(256):
        lane.at(fate).reason = value
        reason = fates.reason(fate)
        assert reason is (Reason(value) if value <= max(Reason) else Reason.GUEST_RESET)
        assert str(reset_error(reason))
    fates.leave(fate)
    lane.at(fate).lane = lib.AV_VSOCK_GONE
    while fates.take() != fate:
        pass
    assert fates.reason(fate) is Reason.MICROVM_ENDED
    fates.close()


def test_a_fate_is_anothers_when_both_sides_are_done_with_it(fates: Fates) -> None:
    lane = LaneFates(fates.fd)
    taken = [fates.take() for _ in range(FATES)]
    assert sorted(fate for fate in taken if fate is not None) == list(range(FATES))
    assert fates.take() is None
    lane.at(7).lane = lib.AV_VSOCK_GONE  # but it was not left here
    fates.leave(8)
    assert fates.take() is None
    lane.at(8).lane = lib.AV_VSOCK_GONE | lib.AV_VSOCK_CLOSED
    assert fates.take() == 8
    assert fates.ends(8) == 0
    fates.close()


def test_what_the_lane_never_had_comes_back_once(fates: Fates) -> None:
    fate = fates.take()
    assert fate is not None
    assert not fates.give_back(fate)
    fates.leave(fate)
    assert fates.give_back(fate)
    assert not fates.give_back(fate)
    os.close(fates.fd)
    fates.close()


def test_nobody_can_change_its_size(fates: Fates) -> None:
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(fates.fd, size)
    os.close(fates.fd)
    fates.close()
