"""The status machine, without a device (virtio 1.3 sections 2.1 and 3.1.1)."""

from __future__ import annotations

import itertools

import pytest

from avmm.virtio.features import VERSION_1
from avmm.virtio.state import (
    ACKNOWLEDGE,
    DEVICE_NEEDS_RESET,
    DRIVER,
    DRIVER_OK,
    FAILED,
    FEATURES_OK,
    DeviceState,
    Transition,
)

OFFERED = VERSION_1 | 1 << 5
READY = ACKNOWLEDGE | DRIVER | FEATURES_OK


def negotiated(features: int = OFFERED) -> DeviceState:
    state = DeviceState(OFFERED)
    state.write(ACKNOWLEDGE | DRIVER)
    state.accept_features(features)
    state.write(READY)
    return state


def test_the_way_of_a_good_driver_ends_in_activate() -> None:
    state = negotiated()
    assert state.status == READY
    assert state.features == OFFERED
    assert state.write(READY | DRIVER_OK) is Transition.ACTIVATE
    assert state.live


@pytest.mark.parametrize("features", [1 << 5, VERSION_1 | 1 << 6, 0, VERSION_1 | 1 << 70])
def test_features_ok_is_refused(features: int) -> None:
    state = negotiated(features)
    assert state.status == ACKNOWLEDGE | DRIVER
    assert state.features == 0
    assert state.write(READY | DRIVER_OK) is Transition.NONE
    assert not state.driver_ok


def test_refused_features_can_be_tried_again() -> None:
    state = negotiated(features=0)
    state.accept_features(VERSION_1)
    state.write(READY)
    assert state.features == VERSION_1


def test_features_are_fixed_once_accepted() -> None:
    state = negotiated(VERSION_1)
    state.accept_features(OFFERED)
    assert state.features == VERSION_1


def test_driver_ok_needs_features_ok() -> None:
    state = DeviceState(OFFERED)
    assert state.write(ACKNOWLEDGE | DRIVER | DRIVER_OK) is Transition.NONE
    assert not state.driver_ok


def test_driver_ok_is_refused_after_failed() -> None:
    state = negotiated()
    state.write(READY | FAILED)
    assert state.write(READY | DRIVER_OK) is Transition.NONE


def test_activates_once() -> None:
    state = negotiated()
    state.write(READY | DRIVER_OK)
    assert state.write(READY | DRIVER_OK) is Transition.NONE


def test_a_driver_can_neither_clear_bits_nor_set_the_devices_own() -> None:
    state = negotiated()
    state.write(ACKNOWLEDGE | DEVICE_NEEDS_RESET)
    assert state.status == READY


def test_needs_reset_ends_live_and_outlasts_all_but_reset() -> None:
    state = negotiated()
    state.write(READY | DRIVER_OK)
    assert state.needs_reset()
    assert not state.needs_reset()
    state.write(READY | DRIVER_OK)
    assert state.status & DEVICE_NEEDS_RESET
    assert not state.live
    assert state.driver_ok


def test_zero_asks_for_a_reset_and_changes_nothing_before_it_is_done() -> None:
    state = negotiated()
    assert state.write(0) is Transition.RESET
    assert state.status == READY
    state.reset()
    assert (state.status, state.features, state.driver_features) == (0, 0, 0)


def test_no_history_of_writes_makes_a_device_live_without_accepted_features() -> None:
    values = (ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK, FAILED, 0xFF)
    for history in itertools.product(values, repeat=3):
        state = DeviceState(OFFERED)
        state.accept_features(1 << 5)  # without VERSION_1
        for value in history:
            assert state.write(value) is Transition.NONE
        assert not state.live
